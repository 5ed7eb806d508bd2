"""The patterns of a config: what they mean to PEFT, and which are refused instead of being run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft_files import case

import loraparam as lp
from loraparam.formats.peft_patterns import matches

LETTERS = "ab.01"
ATOMS = st.sampled_from([*LETTERS, ".", r"\.", r"\d", "[a1]", "[0-9]"])
WORDS = st.lists(st.tuples(ATOMS, st.sampled_from(["", "", "", "*", "+", "?"])), max_size=5).map(
    lambda pieces: "".join(atom + repeat for atom, repeat in pieces)
)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Patterns of the grammar that is read."""
    if draw(st.booleans()):
        return "|".join(
            draw(
                st.lists(
                    st.tuples(st.sampled_from(["", "^"]), WORDS, st.sampled_from(["", "$"])).map("".join),
                    min_size=1,
                    max_size=3,
                )
            )
        )
    middle = [f"({'|'.join(draw(st.lists(WORDS, min_size=1, max_size=3)))})" for _ in range(draw(st.integers(1, 2)))]
    return draw(st.sampled_from(["", "^"])) + "".join(draw(WORDS) + group for group in middle) + draw(WORDS)


@given(patterns(), st.text(LETTERS, max_size=7))
def test_a_pattern_means_what_it_means_to_peft(pattern: str, name: str) -> None:
    assume(sum(map(pattern.count, "*+")) <= 4)  # in each of up to two words written together
    assert matches(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name))
    assert matches(pattern, name, whole=True) == bool(re.fullmatch(pattern.replace("^", "").replace("$", ""), name))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(.*)*(.*)*!",
        "((a))",
        "a{2}",
        r"(?=a)",
        r"(?P<x>a)",
        r"\w",
        r"\1",
        "[^a]",
        "[",
        "a" * 501,
        "(a|b)" * 20,
        ".*" * 9,
        "a|(b)",
        "(^a)",
        "\\",
    ],
)
def test_other_patterns_are_refused(pattern: str, tmp_path: Path) -> None:
    subject, path = case("lora_linear"), tmp_path / "adapter_config.json"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(subject.folder / name, tmp_path / name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {pattern: 3}}))
    with pytest.raises(lp.FormatError, match=r"adapter_config\.json': pattern .*; allowed: "):
        lp.load(subject.model(), tmp_path)
