"""Shared by all configs: precision, clipping, what a run writes and when."""

from diffengine.engine.hooks import CheckpointHook, ExportHook, MetricsHook, PreviewHook

prompts = 4  # captions to preview, or how many captions to take from the data
preview_every = 1  # epochs or steps, as the run counts
checkpoint_every = 1
keep_checkpoints = 3
log_every = 10  # steps
precision = "auto"  # bf16 where the GPU has it, else fp16; fp32 on a CPU
clip_grad = 1.0  # the largest norm of all gradients together; None for no limit

optim_wrapper = dict(precision="${precision}", clip_grad="${clip_grad}")
default_hooks = dict(
    metrics=dict(type=MetricsHook, every="${log_every}"),
    preview=dict(type=PreviewHook, prompts="${prompts}", every="${preview_every}"),
    checkpoint=dict(type=CheckpointHook, every="${checkpoint_every}", keep="${keep_checkpoints}"),
    export=dict(type=ExportHook),
)
