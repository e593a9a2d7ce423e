"""Shared by all configs: precision, clipping, what a run writes and when."""

from diffengine.engine.hooks import CheckpointHook, ExportHook, MetricsHook, PreviewHook, ReportHook, ValidationHook

prompts = 4  # captions to preview, or how many captions to take from the data
preview_every = 1  # epochs or steps, as the run counts
checkpoint_every = 1
keep_checkpoints = 3
log_every = 10  # steps
validation_share = 0.05  # of the images, from 8 to 64, held out if there are at least 32; 0: all are trained
validation_data = None  # other images to validate with
validation_every = None  # epochs or steps; None: as often as 5 % of the time allows; 0: never
patience = None  # stop after so many validations without a lower loss
cache = "auto"  # encode each variation of an image once, if the run sees it more than once
cache_path = None  # its folder; None: cache/ next to the work dir
precision = "auto"  # bf16 where the GPU has it, else fp16; on a CPU fp32, or bf16 if it is measured to be faster
clip_grad = 1.0  # the largest norm of all gradients together; None for no limit
param_groups = None  # options for some parameters: [dict(match="text_encoder.*", lr=1e-5)]
max_bad_steps = 20  # in a row, whose loss or gradients are not finite, end the run; each is skipped and counted

token_cache = dict(use="${cache}", path="${cache_path}")
optim_wrapper = dict(precision="${precision}", clip_grad="${clip_grad}", param_groups="${param_groups}")
default_hooks = dict(
    metrics=dict(type=MetricsHook, every="${log_every}", max_bad_steps="${max_bad_steps}"),
    preview=dict(type=PreviewHook, prompts="${prompts}", every="${preview_every}"),
    validation=dict(
        type=ValidationHook,
        share="${validation_share}",
        data="${validation_data}",
        every="${validation_every}",
        patience="${patience}",
    ),
    checkpoint=dict(type=CheckpointHook, every="${checkpoint_every}", keep="${keep_checkpoints}"),
    export=dict(type=ExportHook),
    report=dict(type=ReportHook),  # the run's page, report.html
)
