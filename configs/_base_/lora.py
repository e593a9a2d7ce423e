"""LoRA on the attention projections of the transformer: a config that extends this trains an adapter."""

from peft import LoraConfig

from diffengine.models.amused import AmusedModel

rank = 16
alpha = 32  # strength is alpha / rank

model = dict(
    type=AmusedModel,
    train=[],
    adapters=dict(
        transformer=dict(type=LoraConfig, r="${rank}", lora_alpha="${alpha}", target_modules=["to_q", "to_k", "to_v"])
    ),
)
