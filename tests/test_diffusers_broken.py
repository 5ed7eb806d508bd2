"""diffusers' files that do not fit are refused, with the model as it was; and formats are told apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_diffusers_read import Net, save_file, spelled
from test_plans import unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import detect

GOOD = {"unet.attn1.to_q.lora_A.weight": torch.ones(1, 4), "unet.attn1.to_q.lora_B.weight": torch.ones(6, 1)}
HEAD = "unet.attn1.to_q"
REFUSALS: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], dict[str, Any], str]] = {
    "half a pair": (
        {f"{HEAD}.lora_B.weight": None},
        {},
        {},
        r"lora_A.weight': half a pair; .*to_q.lora_B.weight' is missing",
    ),
    "two spellings": (spelled(f"{HEAD}.lora.{{updown}}.weight", *GOOD.values()), {}, {}, r"are the same of one module"),
    "two names": (
        spelled("unet.attn1.processor.to_q_lora.{updown}.weight", *GOOD.values()),
        {},
        {},
        r"are the same of one module",
    ),
    "an unknown module": (
        {"unet.attn1.to_x.lora_A.weight": torch.ones(1, 4), "unet.attn1.to_x.lora_B.weight": torch.ones(6, 1)},
        {},
        {},
        r"1 of 2 modules of 'unet\.' are not in the model: 'unet.attn1.to_x'; nearest: 'attn1_to",
    ),
    "an underscore for a dot": (
        {key.replace("attn1.to", "attn1_to"): value for key, value in GOOD.items()},
        {},
        {},
        r"are not in the model: 'unet.attn1_to_q'",
    ),
    "an absent part": (
        {key.replace("unet", "text_encoder").replace("to_q", "x"): value for key, value in GOOD.items()},
        {},
        {},
        r"parts that are not in the model: 'text_encoder\.' \(1 modules\).*prefix='unet\.' loads that part alone",
    ),
    "alpha beside": (
        {f"{HEAD}.alpha": torch.ones(())},
        {},
        {},
        r"to_q.alpha': diffusers passes over it .*; alpha='rank' reads",
    ),
    "a magnitude's size": (
        {f"{HEAD}.lora_magnitude_vector": torch.ones(4)},
        {},
        {},
        r"shape \(4,\); allowed: \(6,\), one per output",
    ),
    "a magnitude alone": ({"unet.conv1.lora_magnitude_vector": torch.ones(6)}, {}, {}, r"no pair of factors"),
    "a bias' size": (
        {f"{HEAD}.lora_B.bias": torch.ones(4)},
        {},
        {},
        r"lora_B.bias': shape \(4,\); 'attn1.to_q.bias' has \(6,\)",
    ),
    "a bias of a DoRA": (
        {f"{HEAD}.lora_B.bias": torch.ones(6), f"{HEAD}.lora_magnitude_vector": torch.ones(6)},
        {},
        {},
        r"a DoRA has none",
    ),
    "half an embedding": ({"unet.table.lora_embedding_A": torch.ones(1, 7)}, {}, {}, r"no pair of factors"),
    "an embedding's shape": (
        {"unet.table.lora_embedding_A": torch.ones(1, 4), "unet.table.lora_embedding_B": torch.ones(7, 1)},
        {},
        {},
        r"shapes \(1, 4\) and \(7, 1\); 'table.weight' has \(7, 4\)",
    ),
    "an embedding that is a Linear": (
        {f"{HEAD}.lora_{ab}.weight": None for ab in "AB"}
        | {f"{HEAD}.lora_embedding_A": torch.ones(1, 6), f"{HEAD}.lora_embedding_B": torch.ones(4, 1)},
        {},
        {},
        r"'attn1.to_q.weight' is no embedding",
    ),
    "a pair for an embedding": (
        {"unet.table.lora_A.weight": torch.ones(1, 7), "unet.table.lora_B.weight": torch.ones(4, 1)},
        {},
        {},
        r"parameter of a Embedding",
    ),
    "mixed groups": (
        {"unet.depth.lora_A.weight": torch.ones(4, 4, 3, 3), "unet.depth.lora_B.weight": torch.ones(6, 2, 1, 1)},
        {},
        {},
        r"the pair mixes the groups",
    ),
    "LoKr": ({"unet.conv1.lokr_w1": torch.ones(2, 2)}, {}, {"format": "diffusers"}, r"lokr_w1': LoKr .* is not read"),
    "dora_scale": (
        {f"{HEAD}.dora_scale": torch.ones(6, 1)},
        {},
        {"format": "diffusers"},
        r"diffusers drops it; format='kohya'",
    ),
    "a header that is no JSON": (
        {},
        {"lora_adapter_metadata": "{"},
        {},
        r"header lora_adapter_metadata'?: not valid JSON",
    ),
    "a header that is a list": ({}, {"lora_adapter_metadata": "[1]"}, {}, r"allowed: an object with fields"),
    "an empty header": ({}, {"lora_adapter_metadata": "{}"}, {}, r"allowed: an object with fields"),
    "a rank of the header": ({}, {"unet.r": 3}, {}, r"gives 'attn1.to_q' rank 3; its tensors have rank 1"),
    "no rank in the header": ({}, {"unet.lora_alpha": 3}, {}, r"gives 'attn1.to_q' rank 8; its tensors have rank 1"),
    "a rank that is a string": ({}, {"unet.r": "1"}, {}, r"r='1'; allowed: a positive integer"),
    "an alpha that is null": (
        {},
        {"unet.r": 1, "unet.lora_alpha": None},
        {},
        r"lora_alpha=None; allowed: a finite number",
    ),
    "an alpha that is NaN": (
        {},
        {"lora_adapter_metadata": '{"unet.r": 1, "unet.lora_alpha": NaN}'},
        {},
        r"not valid JSON",
    ),
    "an alpha beyond float32": (
        {},
        {"unet.r": 1, "unet.lora_alpha": 1e300},
        {},
        r"lora_A.weight': the scale 1e\+300 makes",
    ),
    "a pattern that runs for ever": ({}, {"unet.r": 1, "unet.alpha_pattern": {"(.*)*(.*)*!": 2}}, {}, r"pattern"),
    "a DoRA without magnitude": (
        {},
        {"unet.r": 1, "unet.use_dora": True},
        {},
        r"use_dora=True; the module has no magnitude",
    ),
    "a magnitude that PEFT ignores": (
        {f"{HEAD}.lora_magnitude_vector": torch.ones(6)},
        {"unet.r": 1},
        {},
        r"use_dora=False; the module has magnitude",
    ),
    "a changed base": (
        {},
        {"unet.r": 1, "unet.init_lora_weights": "pissa"},
        {},
        r"init_lora_weights='pissa' also changed the base",
    ),
    "another computation": ({}, {"unet.r": 1, "unet.use_qalora": True}, {}, r"use_qalora"),
    "two alphas": ({}, {"unet.r": 1}, {"alpha": 3}, r"says its alphas in its header; leave out alpha=3"),
    "an alpha that is a word": ({}, {}, {"alpha": "many"}, r"alpha='many'; allowed: a finite number, a mapping"),
    "an alpha for no module": (
        {},
        {},
        {"alpha": {"unet.attn1.to_x": 3}},
        r"no module 'unet.attn1.to_x' in .*nearest: 'unet.attn1.to_q'",
    ),
    "an alpha that is a word, for one": ({}, {}, {"alpha": {"unet.attn1.to_q": "3"}}, r"'3'; a finite number"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    changes, header, hints, message = REFUSALS[name]
    file = GOOD | changes
    if header and "lora_adapter_metadata" not in header:
        header = {"lora_adapter_metadata": json.dumps(header)}
    save_file(
        {key: value for key, value in file.items() if value is not None}, tmp_path / "a.safetensors", header or None
    )
    model = Net()
    with unchanged(model), pytest.raises(lp.FormatError, match=message):
        lp.load(model, tmp_path / "a.safetensors", **hints)


@pytest.mark.parametrize(
    ("file", "key"), [("adapter_model", "q.lora_A.weight"), ("x", "base_model.model.q.lora_A.weight")]
)
def test_peft_tensors_without_their_config_are_not_taken_for_diffusers(tmp_path: Path, file: str, key: str) -> None:
    save_file({key: torch.ones(1, 4), key.replace("A", "B"): torch.ones(4, 1)}, tmp_path / f"{file}.safetensors")
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    with (
        unchanged(model),
        pytest.raises(lp.FormatError, match=r"holds PEFT's tensors, whose scale is in 'adapter_config.json'"),
    ):
        lp.load(model, tmp_path / f"{file}.safetensors")


FORMS = {
    "diffusers": "unet.x.lora_A.weight x.lora.down.weight a.processor.to_q_lora.up.weight x.lora_magnitude_vector",
    "loralib": "x.lora_A unet.x.lora_B",
    "kohya": """
        lora_unet_x.lora_A lora_unet_x.alpha lora_te_x.lora_A.weight lora_te2_x.lora_up.weight x.y.diff
        lycoris_x.lora_down.weight
        lora_transformer_x.lora.up.weight diffusion_model.x.lora_A.weight text_encoders.x.lora_B.weight x.w_norm
        unet.x.dora_scale unet.x.lokr_w1 x.hada_w1_a x.oft_blocks""",
}


@pytest.mark.parametrize(("form", "key"), [(form, key) for form, keys in FORMS.items() for key in keys.split()])
def test_the_format_is_told_from_the_keys(tmp_path: Path, form: str, key: str) -> None:
    save_file({key: torch.ones(1, 1)}, tmp_path / "a.safetensors")
    assert form == detect(tmp_path / "a.safetensors").NAME


def test_other_files_are_in_no_known_format(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(lp.FormatError, match="is in no known format"):
        lp.load(Net(), tmp_path / "a.safetensors")


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_pickle_is_opened_only_where_its_format_is_named(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = Net(), tmp_path / "pytorch_lora_weights.bin"
    torch.save(GOOD, path)
    with unchanged(model), pytest.raises(lp.FormatError, match=r"opened only where its format is named"):
        lp.load(model, path)
    assert [row.path for row in lp.load(model, path, format=format)] == ["attn1.to_q.weight"]
    lp.detach(model)
    for content in (Hostile(), {HEAD: Hostile()}, [1], {HEAD: 1}, {HEAD: torch.ones(2).to_sparse()}, {}):
        torch.save(content, path)
        with unchanged(model), pytest.raises(lp.FormatError, match=r"pytorch_lora_weights\.bin"):
            lp.load(model, path, format=format)
    torch.save(GOOD | {f"{HEAD}.lora_A.weight": torch.ones(1, 4).to_sparse()}, path)
    with unchanged(model), pytest.raises(lp.FormatError, match=r"lora_A.weight': a torch.sparse_coo tensor; allowed"):
        lp.load(model, path, format=format)
    assert "code ran" not in capsys.readouterr().out
