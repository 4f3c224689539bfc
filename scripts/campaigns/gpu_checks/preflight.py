"""The first check of `gpu.py`: can this card run torch's kernels at all? It needs torch and nothing else."""

from pathlib import Path
from typing import Any

import torch

LEAST_GB = 14.0  # free memory that the largest check needs: EfficientNetV2-S at 384 in batches of 48 takes about 12


def compatible(card: tuple[int, int], built: list[str]) -> bool:
    """Whether kernels of this build run on a card.

    They do as machine code of the card's major version and no later minor one, or as PTX of no later version.
    """

    def version(arch: str) -> tuple[int, int]:
        digits = "".join(c for c in arch.partition("_")[2] if c.isdigit())
        return int(digits[:-1]), int(digits[-1])

    code = any(a.startswith("sm_") and version(a)[0] == card[0] and version(a)[1] <= card[1] for a in built)
    return code or any(a.startswith("compute_") and version(a) <= card for a in built)


def conv_error(device: torch.device) -> float:
    "Relative error of a bf16 convolution in channels_last against fp64 on the CPU."
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 16, 32, 32, generator=g), torch.randn(32, 16, 3, 3, generator=g)
    x, w = x.bfloat16(), w.bfloat16()
    want = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    near = dict(device=device, memory_format=torch.channels_last)
    got = torch.nn.functional.conv2d(x.to(**near), w.to(**near), padding=1).double().cpu()
    return float((got - want).norm() / want.norm())


def preflight(device: str, _tiny: bool, _work: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    "GP1."

    def part(name, value, limit, passed, unit="", note=""):
        return dict(name=name, value=value, limit=limit, passed=passed, required=True, unit=unit, note=note)

    error = part("error of a bf16 convolution", conv_error(torch.device(device)), "≤ 0.01", None)
    error["passed"] = error["value"] <= 0.01
    if device == "cpu":
        return [error], {}
    card, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    free, total = (v / 2**30 for v in torch.cuda.mem_get_info())
    facts = dict(
        device=torch.cuda.get_device_name(),
        memory_gb=round(total, 1),
        capability=f"{card[0]}.{card[1]}",
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        built_for=built,
    )
    return [
        part(
            "architecture",
            f"sm_{card[0]}{card[1]}",
            "this torch has kernels for it",
            compatible(card, built),
            "",
            ", ".join(built),
        ),
        error,
        part("free memory", free, f"≥ {LEAST_GB:g}", free >= LEAST_GB, "GiB", f"of {total:.1f}"),
    ], facts
