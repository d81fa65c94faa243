"""Wan's VAE on a video that never ends: latent frames in, pixels out, as one decoding of the whole would give them.

The VAE's causal convolutions keep the last frames of each layer between calls; `AutoencoderKLWan.decode` forgets them
when it returns. Here they are kept from chunk to chunk, so that there is no seam.
"""

from __future__ import annotations

from typing import Any

import torch


class StreamingDecoder:
    """Decodes chunks of latents that follow each other.

    On GPUs the decoder's convolutions are laid out channels last, and stay so: a tenth less time, no other result but
    for rounding. `vae.decoder.compile(dynamic=False)` before the first chunk is followed too (torch 2.11 makes
    several graphs of it, torch 2.13 one).

    Args:
        vae: an `AutoencoderKLWan`. Tiling is not used: a chunk is a few frames.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self._first = True

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next frames.

        Args:
            latents: (b, channels, frames, height, width) as the transformer has them.

        Returns:
            (b, 3, pixel frames, height, width) in [-1, 1]: 1 frame for the very first latent frame, then 4 each (or
            what the VAE's scale in time is).
        """
        vae = self.vae
        if hasattr(vae, "_hf_hook"):  # model offload: weights come to the device when `decode` is called
            vae._hf_hook.pre_forward(vae)
        if self._first and vae.device.type == "cuda":
            channels_last(vae.decoder)
        z = vae.post_quant_conv(to_vae(latents, vae))
        pixels = []
        for frame in z.split(1, dim=2):
            pixels.append(vae.decoder(frame, feat_cache=self._kept, feat_idx=[0], first_chunk=self._first))
            self._first = False
        video = torch.cat(pixels, 2)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def snapshot(self) -> tuple[list[Any], bool]:
        """What is kept between chunks. It is replaced at each call, never written to, so a list of it is a copy."""
        return list(self._kept), self._first

    def restore(self, snapshot: tuple[list[Any], bool]) -> None:
        """Go back to a snapshot."""
        self._kept, self._first = list(snapshot[0]), snapshot[1]


def channels_last(module: torch.nn.Module) -> None:
    """Lay out the weights of convolutions as tensor cores read them."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = torch.channels_last if part.weight.ndim == 4 else torch.channels_last_3d
            part.weight.data = part.weight.data.contiguous(memory_format=layout)


def encode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """Pixels (b, 3, frames, height, width) in [-1, 1] -> latents (b, channels, frames, height, width) fp32."""
    latents = vae.encode(video.to(_device(vae), vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    normalised: torch.Tensor = (latents - mean) / std
    return normalised.float()


def to_vae(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Latents of the transformer -> latents of the VAE, in its dtype."""
    latents = latents.to(_device(vae), vae.dtype)
    mean, std = _statistics(vae, latents)
    # Divided by the inverse, as diffusers does, so that results are equal to the last bit.
    return latents / (1.0 / std) + mean


def _device(vae: Any) -> Any:
    """Where it computes; under offload its weights are elsewhere until they are needed."""
    hooks = (getattr(part, "_hf_hook", None) for part in vae.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in found if device is not None), vae.device)


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
