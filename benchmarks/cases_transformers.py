"""Models of transformers, from configs."""

from __future__ import annotations

from torch import Tensor, nn

from .case import Case, floats, usual_rank

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def embedded(model: nn.Module, x: Tensor) -> Tensor:
    """A transformers model on embedded tokens."""
    output: Tensor = model(inputs_embeds=x).last_hidden_state
    return output


def llama(
    hidden: int, tokens: int, *, r: int = 0, layers: int = 4, batch: int = 1, kinds: int = 7, stacked: int = 1
) -> Case:
    """Llama layers, with adapters on all seven linears of each, or on the first ``kinds`` of them."""

    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=max(2, hidden // 64),
            use_cache=False,
        )
        return LlamaModel(config)

    return Case(
        name=f"llama {hidden}×{tokens}" + (f" r{r}" if r else ""),
        about=f"{layers} Llama layers, hidden {hidden}, {batch} × {tokens} tokens, "
        + ("all linears" if kinds == len(LINEARS) else ", ".join(LINEARS[:kinds])),
        model=model,
        x=floats(batch, tokens, hidden),
        call=embedded,
        targets=LINEARS[:kinds],
        peft={"target_modules": LINEARS[:kinds]},
        r=r or usual_rank(hidden),
        stacked=stacked,
        positions=batch * tokens,
        needs=("transformers",),
    )


def gpt2(hidden: int, tokens: int, *, layers: int = 4) -> Case:
    """GPT-2, whose Conv1D stores its weight (in, out)."""

    def model() -> nn.Module:
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=8,
            n_positions=tokens,
            n_embd=hidden,
            n_layer=layers,
            n_head=max(2, hidden // 64),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2Model(config)

    return Case(
        name="gpt-2",
        about=f"GPT-2 from a config, {layers} layers, width {hidden}, {tokens} tokens, all Conv1D",
        model=model,
        x=floats(1, tokens, hidden),
        call=embedded,
        targets="all-linear",
        peft={"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        r=usual_rank(hidden),
        positions=tokens,
        needs=("transformers",),
    )


def mixtral(hidden: int, tokens: int, kind: str) -> Case:
    """Mixtral, whose experts are 3-D parameters that one of three functions multiplies."""

    def model() -> nn.Module:
        from transformers import MixtralConfig, MixtralModel

        config = MixtralConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=max(2, hidden // 64),
            num_key_value_heads=max(2, hidden // 64),
            num_local_experts=8,
            num_experts_per_tok=2,
            use_cache=False,
        )
        model = MixtralModel(config)
        model.set_experts_implementation(kind)
        return model

    return Case(
        name=f"mixtral {kind}",
        about=f"Mixtral, 2 layers, hidden {hidden}, 8 experts of which 2 act, {tokens} tokens, attention and experts",
        model=model,
        x=floats(1, tokens, hidden),
        call=embedded,
        targets=["all-linear", "gate_up_proj", "down_proj"],
        peft={"target_modules": LINEARS[:4], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        r=usual_rank(hidden),
        positions=tokens,
        rows={"*.gate_up_proj": 2, "*.down_proj": 2},
        needs=("transformers",),
    )
