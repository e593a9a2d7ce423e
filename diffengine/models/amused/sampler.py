"""Generates images: predict the masked tokens, keep the surest, mask the others again.

Equal to AmusedPipeline, token by token, for one image on a CPU in fp32, where AmusedPipeline is right. All decisions
(softmax, noise, confidences) are made in fp32, whatever the dtype of the transformer.

Legend: B images, h w token grid, L = h * w, T text length, D text width, V codes, M masked tokens of all images.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffengine.errors import require
from diffengine.models.amused.preprocessor import caption_ids, encode_ids, in_fp32, to_device, vq_ids
from diffengine.models.amused.transformer import blocks_of, conditions_once, head, trunk
from diffengine.models.cuda_graphs import CudaGraphs
from diffengine.models.generation import GenerationOptions, ImageRequest, ImageSampler, NotFinite, Unmasking
from diffengine.models.masking import Schedule, TokenGrid, mask_tokens, masked_index

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32768}  # B * L of a batch
PIXELS_AT_ONCE = {"cpu": 1, "cuda": 2**22}  # decoded at once; on a CPU one image
IMAGES_AT_ONCE = 64
SMALL_IMAGE = 128**2  # pixels: on a CPU, up to this size every image is decoded on one thread
MOST_TEXTS = 1024  # kept encoded: 0.2 GB at full size
Text = tuple[Tensor, Tensor]  # hidden states (B,T,D) and pooled embedding (B,D)
Size = tuple[int, int]  # width and height in pixels


@final
class AmusedSampler(ImageSampler):
    """Generates with the modules of an aMUSEd model, in eval mode, on the transformer's device.

    Args:
        vqvae, tokenizer, text_encoder, transformer, scheduler: the model's components; of the scheduler, the settings.
        guidance_scale: None for what suits the model's size.
        mask_schedule: that it was trained with, for its loss.
        graphs: replay the transformer's kernels on a GPU; for weights that no longer change, outside of autocast.
    """

    def __init__(
        self, vqvae: VQModel, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModelWithProjection,
        transformer: UVit2DModel, scheduler: AmusedScheduler, guidance_scale: float | None = None,
        mask_schedule: Schedule = "cosine", graphs: bool = False,
    ) -> None:  # fmt: skip
        self.vqvae, self.tokenizer, self.text_encoder, self.transformer = vqvae, tokenizer, text_encoder, transformer
        self.mask_id: int = scheduler.config.mask_token_id
        self.num_codes: int = transformer.config.codebook_size
        self.mask_schedule: Schedule = mask_schedule
        self.masking_schedule: Unmasking = scheduler.config.masking_schedule
        self.grid = TokenGrid.of(vqvae.config, transformer.config)
        self.side = transformer.config.sample_size * self.grid.factor
        self.size_multiple = self.grid.pixels
        self.guidance_scale = usual_guidance(self.side) if guidance_scale is None else guidance_scale
        self._images = VaeImageProcessor(vae_scale_factor=self.grid.factor, do_normalize=False)
        self._masks = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        self._texts: dict[str, Text] = {}
        self._compiled = False
        self._trunk = CudaGraphs(partial(trunk, transformer)) if graphs else partial(trunk, transformer)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "AmusedSampler":
        self.vqvae.to(device)
        for module in (self.text_encoder, self.transformer):
            module.to(device, dtype)
        self._texts.clear()
        if isinstance(self._trunk, CudaGraphs):
            self._trunk.clear()
        return self

    def compile(self) -> None:
        self._compiled = True
        for block in blocks_of(self.transformer):
            block.compile()

    def cut(self, prompt: str) -> str:
        ids = self.tokenizer(prompt, verbose=False).input_ids
        kept = self.tokenizer.model_max_length - 1  # the last one is the end token
        return self.tokenizer.decode(ids[kept:-1]).strip() if len(ids) > kept + 1 else ""

    def generate(
        self,
        requests: Sequence[ImageRequest],
        options: GenerationOptions | None = None,
        size: Size | None = None,
        batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Image.Image]:
        options = options or GenerationOptions()
        batches: list[tuple[list[ImageRequest], tuple[int, int]]] = []

        def together(request: ImageRequest) -> tuple[Size, int]:
            return self._size(request, size), first_step(request, options)

        for ((width, height), _), group in groupby(requests, together):
            grid, rest = self.grid.sides(height, width), list(group)
            check_steps(options, grid)
            most = batch_size or min(IMAGES_AT_ONCE, max(1, TOKENS_AT_ONCE[self.device.type] // math.prod(grid)))
            batches += [(rest[start : start + most], grid) for start in range(0, len(rest), most)]
        return self._generate(batches, options, on_step)

    @torch.no_grad()
    def _generate(
        self,
        batches: Sequence[tuple[list[ImageRequest], tuple[int, int]]],
        options: GenerationOptions,
        on_step: Callable[[int], None] | None,
    ) -> Iterator[Image.Image]:
        for batch, grid in batches:
            report = partial(_report, on_step, len(batch)) if on_step else None
            yield from self.decode(self.tokens(batch, options, grid, report))

    @torch.no_grad()
    def generate_steps(
        self, request: ImageRequest, options: GenerationOptions | None = None, size: Size | None = None
    ) -> list[Image.Image]:
        width, height = self._size(request, size)
        steps: list[Tensor] = []
        grid = self.grid.sides(height, width)
        self.tokens([request], options or GenerationOptions(), grid, lambda ids: steps.append(ids.clone()))
        return [image for ids in steps for image in self.decode(ids)]

    @torch.no_grad()
    def reconstruct(self, images: Sequence[Image.Image]) -> Iterator[Image.Image]:
        for image in images:
            width, height = self._size(ImageRequest("", image=image), None)
            yield from self.decode(self.encode(image, self.grid.sides(height, width)))

    def _size(self, request: ImageRequest, size: Size | None) -> Size:
        """The size of the image to generate; that of a request's image is rounded down to the grid."""
        size = size or request.size
        if size is not None or request.image is None:
            return size or (self.side, self.side)
        step = self.grid.pixels
        width, height = (max(step, side // step * step) for side in request.image.size)
        return width, height

    @torch.no_grad()
    def tokens(
        self,
        requests: Sequence[ImageRequest],
        options: GenerationOptions,
        grid: tuple[int, int],
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Generate the token ids (B,h,w) int64 of one batch, whose images all start at the same step.

        Args:
            on_step: called with the ids after each step; some are masked.

        Raises:
            NotFinite: the transformer's outputs are infinite or NaN.
            UserError: more steps than tokens.
        """
        (h, w), steps = grid, options.num_inference_steps
        length, first = h * w, first_step(requests[0], options)
        check_steps(options, grid)
        options = options.or_guided_by(self.guidance_scale)
        images = [self._start(request, options, grid) for request in requests]
        ids_BL = torch.stack([image.ids_L for image in images])
        prompts = [request.prompt for request in requests]
        if any(options.guidance_at(step) > 1 for step in range(first, steps)):
            prompts = [*(request.negative_prompt for request in requests), *prompts]
        text = self._text(prompts)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        with self._fast_passes():
            for step in range(first, steps):
                index_M = torch.cat([image.masked + number * length for number, image in enumerate(images)])
                logits_MV = self._logits(ids_BL.view(-1, h, w), index_M, text, options.guidance_at(step))
                finite &= logits_MV.sum().isfinite()
                advance(images, ids_BL, logits_MV.softmax(dim=-1), step, options, self.mask_id)
                if on_step is not None:
                    on_step(ids_BL.view(-1, h, w))
        if not finite:  # the only read from the device
            advice = "train with a lower learning rate, or generate in bf16 or fp32"
            raise NotFinite(f"the model's outputs are not finite, so it generates nothing; {advice}")
        return ids_BL.view(-1, h, w)

    @contextmanager
    def _fast_passes(self) -> Iterator[None]:
        """Inside, all passes are over the same conditions. For blocks that are neither compiled nor recorded."""
        if self.device.type == "cpu" and not self._compiled:
            with conditions_once(self.transformer), torch.inference_mode():
                yield
        else:
            yield

    def _start(self, request: ImageRequest, options: GenerationOptions, grid: tuple[int, int]) -> "MaskedImage":
        """What a request starts from: all tokens masked, or some of its image's."""
        length, first = math.prod(grid), first_step(request, options)
        noise = Noise(request.seed, self.device, options.exact)
        schedule = options.masking_schedule or ("linear" if request.mask is not None else self.masking_schedule)
        ids_L = torch.full((length,), self.mask_id)
        masked_L = torch.ones(length, dtype=torch.bool)
        if request.image is not None:
            ids_L = self.encode(request.image, grid).flatten().cpu()
        if request.mask is not None:
            masked_L = self._mask(request.mask, grid)
        elif request.image is not None and first > 0:
            masked_L = noise.of_image(length) < masked_share(first, options.num_inference_steps, schedule)
        ids_L[masked_L] = self.mask_id
        share = float(masked_L.sum() / length) if request.mask is not None else 1.0
        masked = to_device(masked_L.nonzero()[:, 0], self.device)
        rank_L = halton_rank(*grid).to(self.device) if options.order == "halton" else None
        keep_ties = noise.from_host and next(self.transformer.parameters()).dtype == torch.float32
        return MaskedImage(to_device(ids_L, self.device), masked, noise, schedule, share, rank_L, keep_ties)

    def _mask(self, mask: Image.Image, grid: tuple[int, int]) -> Tensor:
        """(L,) bool: the tokens at least half of which is white."""
        h, w = grid
        mask = _fit(mask.convert("L"), (w * self.grid.factor, h * self.grid.factor))
        return self._masks.preprocess(mask, h, w).flatten().bool()

    def encode(self, image: Image.Image, grid: tuple[int, int]) -> Tensor:
        """The token ids (1,h,w) of an RGB image, whose centre is cut out and resized to the grid."""
        image = _fit(image.convert("RGB"), (grid[1] * self.grid.factor, grid[0] * self.grid.factor))
        with in_fp32(self.device):
            return vq_ids(self.vqvae, self._images.preprocess(image).to(self.device))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Mapping[str, Tensor]:
        self.grid.sides(*images.shape[-2:])
        with in_fp32(self.device):
            ids = vq_ids(self.vqvae, images.to(self.device, memory_format=torch.channels_last))  # as in training
        return {"token_ids": ids.cpu()}

    @torch.no_grad()
    def masked_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        ids = batch["token_ids"].long().to(self.device)
        index = masked_index(batch["masked"], ids[0].numel()).to(self.device)
        masked, targets = mask_tokens(ids, index, self.mask_id), ids.flatten()[index]
        logits = self._logits(masked, index, self._text(batch["text"]), 1.0, batch["micro_conds"])
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(dim=1) == targets).sum()

    def _text(self, prompts: Sequence[str]) -> Text:
        """The text encoder's outputs for a batch."""
        if len(self._texts) > MOST_TEXTS:
            self._texts.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:  # one at a time: the last bits would depend on the batch
                text_ids = caption_ids(self.tokenizer, [prompt]).to(self.device)
                self._texts[prompt] = encode_ids(self.text_encoder, text_ids)
        hidden, pooled = (torch.cat([self._texts[prompt][number] for prompt in prompts]) for number in (0, 1))
        return hidden, pooled

    def _logits(
        self, ids_Bhw: Tensor, index_M: Tensor, text: Text, guidance: float, micro_conds: Tensor | None = None
    ) -> Tensor:
        """Logits (M,V) in fp32 at the flat positions `index_M`, guided where `guidance` is over 1.

        `text`: of the negative prompts, if there is guidance at all, and of the prompts. `micro_conds` (B,5): None for
        those of a whole image.
        """
        hidden, pooled = text
        (_, h, w), guided = ids_Bhw.shape, guidance > 1
        if guided:
            index_M = torch.cat([index_M, index_M + ids_Bhw.numel()])
            ids_Bhw = torch.cat([ids_Bhw, ids_Bhw])
        if micro_conds is None:
            size = [side * self.grid.factor for side in (w, h)]
            micro_conds = torch.tensor([[*size, 0, 0, 6]]).expand(len(ids_Bhw), -1)
        rows = slice(-len(ids_Bhw), None)  # those of the prompts, unless guided
        conditions = to_device(micro_conds.to(hidden.dtype), self.device)
        hidden_BTD = self._trunk(ids_Bhw, conditions, hidden[rows], pooled[rows])
        logits_MV = head(self.transformer, hidden_BTD, index_M).float().contiguous()
        if not guided:
            return logits_MV
        uncond, cond = logits_MV.chunk(2)
        return cond.sub_(uncond).mul_(guidance).add_(uncond)

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Iterator[Image.Image]:
        """Token ids (B,h,w) as images; tokens that are still masked are grey. In fp32, since fp16 makes NaN."""
        pixels = math.prod(token_ids.shape[1:]) * self.grid.factor**2
        chunks = token_ids.split(max(1, PIXELS_AT_ONCE[self.device.type] // pixels))
        if self.device.type == "cpu" and pixels <= SMALL_IMAGE:
            with in_fp32(self.device):
                decoded = in_threads(self._decode, chunks)
            yield from (image for images in decoded for image in images)
            return
        for ids in chunks:
            with in_fp32(self.device):
                images = self._decode(ids)
            yield from images

    @torch.no_grad()
    def _decode(self, ids: Tensor) -> list[Image.Image]:
        masked, shape = ids == self.mask_id, (*ids.shape, self.vqvae.config.latent_channels)
        images = self.vqvae.decode(ids.masked_fill(masked, 0), force_not_quantize=True, shape=shape).sample
        hidden = F.interpolate(masked[:, None].float(), scale_factor=self.grid.factor)
        return self._images.postprocess(images.clamp(0, 1) * (1 - hidden) + 0.5 * hidden, output_type="pil")


@dataclass
class MaskedImage:
    """One image on its way from masked to generated tokens."""

    ids_L: Tensor  # those that it starts with
    masked: Tensor  # positions (m,) int64
    noise: "Noise"
    schedule: Unmasking
    share: float  # of its tokens that are masked before the first step
    rank_L: Tensor | None  # the order of its positions, if it is fixed
    keep_ties: bool  # keep tokens that are as sure as one that is kept, as AmusedScheduler does; reads from the device

    def mask_again(self, ids_L: Tensor, sure_m: Tensor, step: int, steps: int, mask_id: int) -> None:
        """Mask the least sure of the tokens that were masked again, in place."""
        count, length = len(self.masked), len(ids_L)
        if count == 0:
            return
        left = max(1, min(count - 1, masked_count(length, self.share, step + 1, steps, self.schedule)))
        order_m = sure_m.argsort(stable=True)
        if self.keep_ties and left < count:
            left = int((sure_m < sure_m[order_m[left]]).sum())
        self.masked = self.masked[order_m[:left]]
        ids_L[self.masked] = mask_id


def advance(
    images: Sequence[MaskedImage], ids_BL: Tensor, probs_MV: Tensor, step: int, options: GenerationOptions, mask_id: int
) -> None:
    """Draw the masked tokens; then, unless this is the last step, mask the least sure of them again, in place."""
    (_, length), steps = ids_BL.shape, options.num_inference_steps
    # torch.multinomial computes this too, with noise for all positions
    shape = (length, probs_MV.shape[1])
    noise_MV = torch.cat(in_threads(lambda image: image.noise.exponential(step, image.masked, shape), images))
    ids_M = largest(torch.div(probs_MV, noise_MV, out=noise_MV))
    counts = [len(image.masked) for image in images]
    for image, ids_L, ids_m in zip(images, ids_BL, ids_M.split(counts)):
        ids_L[image.masked] = ids_m
    if step + 1 == steps:
        return
    if options.order == "confidence":
        chosen_M = probs_MV.gather(1, ids_M[:, None])[:, 0].clamp(1e-20).log()
        uniform_M = torch.cat([image.noise.uniform(step, image.masked, length) for image in images])
        gumbel_M = -(-uniform_M.clamp(1e-20).log()).clamp(1e-20).log()
        sure_M = chosen_M + float(options.temperatures[step]) * gumbel_M
    else:
        sure_M = torch.cat([-image.rank_L[image.masked] for image in images if image.rank_L is not None])
    for image, ids_L, sure_m in zip(images, ids_BL, sure_M.split(counts)):
        image.mask_again(ids_L, sure_m, step, steps, mask_id)


class Noise:
    """The random numbers of one image.

    From a generator on the host, in the order in which AmusedPipeline draws them; or, on a GPU unless `exact`, from one
    on the device that starts again at each step, so that the host waits for nothing.
    """

    def __init__(self, seed: int, device: torch.device, exact: bool) -> None:
        self._seed, self._device = seed, device
        self.from_host = device.type == "cpu" or exact
        self._host = torch.Generator().manual_seed(seed)
        self._generator = self._host if self.from_host else torch.Generator(device)

    def of_image(self, length: int) -> Tensor:
        """Uniform numbers (L,) on the host, before the first step."""
        return torch.rand(length, generator=self._host)

    def exponential(self, step: int, positions: Tensor, shape: tuple[int, int]) -> Tensor:
        """Exponential numbers (m,V) at some of L positions; shape: (L,V)."""
        if self.from_host:
            # torch's exponential_ computes this too, for all positions, in one thread
            uniform_LV = torch.rand(shape, dtype=torch.float64, generator=self._host)
            return uniform_LV[positions.cpu()].neg_().log1p_().neg_().float().to(self._device)
        self._generator.manual_seed(_mix(self._seed, step))
        return torch.empty(len(positions), shape[1], device=self._device).exponential_(generator=self._generator)

    def uniform(self, step: int, positions: Tensor, length: int) -> Tensor:
        """Uniform numbers (m,) at some of L positions, after `exponential` of the same step."""
        if self.from_host:
            return torch.rand(length, generator=self._host).to(self._device)[positions]
        return torch.rand(len(positions), device=self._device, generator=self._generator)


def largest(rows_MV: Tensor) -> Tensor:
    """The argmax of each row, (M,) int64; on a CPU by numpy, which takes a fifth of torch's time."""
    if rows_MV.device.type == "cpu":
        return torch.from_numpy(rows_MV.numpy().argmax(axis=-1))
    return rows_MV.argmax(dim=-1)


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call a function on each item, on as many threads as torch has, one thread each; the results are in order.

    For operations that are too small for several threads, whose results must not depend on the number of items.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items)) if len(items) > 1 else [function(items[0])]
    finally:
        torch.set_num_threads(threads)


def check_steps(options: GenerationOptions, grid: tuple[int, int]) -> None:
    """Refuse more steps than tokens: each step keeps at least one."""
    (h, w), steps = grid, options.num_inference_steps
    require(steps <= h * w, f"got {steps} steps for {w}x{h} tokens; expected at most one step per token")


def first_step(request: ImageRequest, options: GenerationOptions) -> int:
    """The step at which a request starts: 0 unless it keeps some of its image."""
    if request.image is None:
        require(request.mask is None, "got a mask but no image that it could keep some of")
        return 0
    strength, steps = request.strength, options.num_inference_steps
    if strength is None:
        strength = 0.5 if request.mask is None else 1.0
    require(0 < strength <= 1, f"strength got {strength}; expected a number over 0, up to 1")
    taken = int(steps * strength)
    require(
        taken >= 1, f"strength {strength} of {steps} steps is less than one step; expected at least {1 / steps:.2g}"
    )
    return steps - taken


def masked_share(step: int, steps: int, schedule: Unmasking) -> Tensor:
    """The share of tokens that are masked after `step` of `steps` steps, fp32, to the bit as in AmusedScheduler."""
    ratio = torch.tensor(step) / steps
    if schedule == "cosine":
        return torch.cos(ratio * math.pi / 2)
    return 1 - ratio if schedule == "linear" else torch.arccos(ratio) / (math.pi / 2)


@lru_cache(maxsize=1024)
def masked_count(length: int, share: float, step: int, steps: int, schedule: Unmasking) -> int:
    """The number of tokens that are masked after a step, of which `share` were before the first."""
    return int((length * (torch.tensor(share) * masked_share(step, steps, schedule))).floor())


@lru_cache
def halton_rank(h: int, w: int) -> Tensor:
    """(L,) int64: when each position of a grid is first hit by the Halton sequence of bases 2 and 3."""
    count = 4 * h * w
    while True:
        hits = halton_cells(count, 2, h) * w + halton_cells(count, 3, w)
        positions, first = np.unique(hits, return_index=True)
        if len(positions) == h * w:
            return torch.from_numpy(first.argsort().argsort())
        count *= 2


def halton_cells(count: int, base: int, side: int) -> np.ndarray:
    """The cells, of `side`, in which the first `count` numbers of the Halton sequence of a base lie.

    Its number 6 = 110 in base 2 is 0.011 = 0.375: the digits mirrored at the point. In whole numbers, since rounding
    would move those on a border to the next cell.
    """
    numbers = np.arange(1, count + 1)
    mirrored, scale = np.zeros_like(numbers), 1
    while numbers.any():
        mirrored, scale = mirrored * base + numbers % base, scale * base
        numbers //= base
    return mirrored * side // scale


def usual_guidance(side: int) -> float:
    """The guidance scale for a model of images of `side` pixels; by published FIDs 4 for 256 and 10 for 512."""
    return 10.0 if side >= 512 else 4.0 if side >= 256 else 2.0


def _mix(seed: int, step: int) -> int:
    """A seed for one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _fit(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image, cut out and resized to a size."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _report(on_step: Callable[[int], None], count: int, _: Tensor) -> None:
    on_step(count)
