"""What chips can do, as their makers publish it: rates of products, memory, and networks.

A `Chip` is one device as JAX counts them: half of a TPU7x chip, whole chips of the others. Rates and
bandwidths are the published peaks; beside them stands the share of its peak that a large product was
measured to reach, and that attention does, with their sources. Rates of float32 products follow from
how `jax.lax.Precision` is carried out: on TPUs in 1, 3 or 6 passes of bfloat16, on NVIDIA GPUs in TF32
or, at the highest, without tensor cores.
"""

import dataclasses
from collections.abc import Mapping

DECOMPOSITIONS = 0.01
"""Share of the highest-precision float32 rate that eigenvalues, QR and triangular solves reach. An
assumption: nobody publishes it, it depends on the size, and it decides nothing but the time of
refreshes."""

REACHED = {"tpu": 0.92, "h100": 0.80, "h200": 0.80, "b200": 0.776}
"""Share of the published peak that the largest products reach. TPUs: XLA's product of 8192 x 8192
bfloat16 matrices on a v5e, taken for the other generations too (docs/pallas/tpu/matmul.ipynb of
jax-ml/jax). GPUs: the best of all shapes that stas00/ml-engineering tried (compute/accelerator,
"Maximum Achievable Matmul FLOPS")."""
ATTENTION = {"tpu": 0.92, "h100": 0.35, "h200": 0.35, "b200": 0.35}
"""Share that attention reaches. GPUs: FlashAttention-2 on an H100; FlashAttention-3 reaches 0.75
(Shah et al., 2024, https://arxiv.org/abs/2407.08608). TPUs: as other products, since we found no
published rate."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device and its networks."""

    name: str
    memory: float
    """Bytes."""
    products: Mapping[str, float]
    """Operations a second, by kind: bfloat16, float32, float32:high, float32:highest."""
    bandwidth: float
    """Bytes a second from and to memory."""
    link: float
    """Bytes a second of one link to a neighbour, in one direction; of GPUs, into the switch of a
    node."""
    network: float
    """Bytes a second to other slices or nodes, in one direction."""
    host: float
    """Bytes a second from and to the memory of the host, in one direction."""
    wraps: int = 0
    """A dimension of a torus closes to a ring if it is a multiple of this; 0 for GPUs, behind a
    switch."""
    cubes: bool = False
    """Whether it closes only where all dimensions do, as optical switches join whole cubes."""
    node: int = 0
    """GPUs behind one switch."""
    reached: float = 1.0
    """Share of the peak that large products reach, `REACHED`."""
    attention: float = 1.0
    """Share of the peak that a kernel of attention reaches, `ATTENTION`."""
    sources: tuple[str, ...] = ()

    def seconds(self, kind: str, operations: float, moved: float = 0.0) -> float:
        """The longer of calculating, at the share of the peak that is reached, and moving.

        Args:
          kind: as the keys of `products`, or "decomposition".
          operations: how many.
          moved: bytes read and written.

        Example:
          >>> from ravine.training.plan.chips import CHIPS
          >>> CHIPS["v5e"].seconds("bfloat16", 0.92 * 197e12)
          1.0
          >>> CHIPS["v5e"].seconds("bfloat16", 1.0, 819e9)
          1.0
        """
        rate = self.products["float32:highest"] * DECOMPOSITIONS
        if kind != "decomposition":
            rate = self.reached * self.products.get(kind, self.products["float32"])
        return max(operations / rate, moved / self.bandwidth)

    def at_peak(self) -> "Chip":
        """The same, reaching its peak: times become lower bounds.

        Example:
          >>> from ravine.training.plan.chips import CHIPS
          >>> CHIPS["h100"].at_peak().seconds("bfloat16", 989e12)
          1.0
        """
        return dataclasses.replace(self, reached=1.0, attention=1.0)


_TPU = "https://cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus"


def _tpu(
    name: str,
    memory: float,
    rate: float,
    bandwidth: float,
    link: float,
    network: float,
    *sources: str,
    wraps: int,
    host: float = 15e9,
) -> Chip:
    products = {
        "bfloat16": rate,
        "float32": rate,
        "float32:high": rate / 3,
        "float32:highest": rate / 6,
    }
    return Chip(
        name,
        memory,
        products,
        bandwidth,
        link,
        network,
        host,
        wraps=wraps,
        cubes=wraps == 4,
        reached=REACHED["tpu"],
        attention=ATTENTION["tpu"],
        sources=(*sources, _BOOK),
    )


def _gpu(
    name: str, memory: float, bandwidth: float, link: float, *rates: float, source: str
) -> Chip:
    bfloat16, tf32, float32 = rates
    products = {
        "bfloat16": bfloat16,
        "float32": tf32,
        "float32:high": tf32,
        "float32:highest": float32,
    }
    # 400 Gb/s of InfiniBand per GPU; a PCIe 5.0 slot of 16 lanes.
    return Chip(
        *(name, memory, products, bandwidth, link, 50e9, 64e9),
        node=8,
        reached=REACHED[name],
        attention=ATTENTION[name],
        sources=(source,),
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # ICI is published in both directions over all ports: 6 of them, or 4 in a 2D torus. DCN is
        # in bits.
        _tpu("v4", 32e9, 275e12, 1.2e12, 45e9, 6.25e9, f"{_TPU}v4", wraps=4),
        _tpu("v5e", 16e9, 197e12, 819e9, 50e9, 3.125e9, f"{_TPU}v5e", wraps=16),
        _tpu("v5p", 95e9, 459e12, 2.765e12, 100e9, 6.25e9, f"{_TPU}v5p", wraps=4),
        _tpu("v6e", 32e9, 918e12, 1.638e12, 100e9, 12.5e9, f"{_TPU}v6e", wraps=16, host=32e9),
        # Two devices per chip, each with half of it; both use the chip's links.
        _tpu("tpu7x", 96e9, 1153.5e12, 3.69e12, 50e9, 6.25e9, f"{_TPU}tpu7x", wraps=4),
        _gpu(
            *("h100", 80e9, 3.35e12, 450e9, 989e12, 494.5e12, 67e12),
            source="https://www.nvidia.com/en-us/data-center/h100/ (SXM, without sparsity)",
        ),
        _gpu(
            *("h200", 141e9, 4.8e12, 450e9, 989e12, 494.5e12, 67e12),
            source="https://www.nvidia.com/en-us/data-center/h200/ (SXM, without sparsity)",
        ),
        _gpu(
            *("b200", 180e9, 7.7e12, 900e9, 2250e12, 1125e12, 75e12),
            source="https://www.nvidia.com/en-us/data-center/hgx/ (HGX B200, without sparsity)",
        ),
    )
}
"""By generation."""

_KINDS = {
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v5p": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "tpu7x": "tpu7x",
    "nvidia h100": "h100",
    "nvidia h200": "h200",
    "nvidia b200": "b200",
}
"""How JAX's names of devices begin, in lower case."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, or None for one that is not listed, as a CPU.

    Example:
      >>> from ravine.training.plan.chips import chip_of
      >>> chip_of("TPU v5 lite").name, chip_of("NVIDIA H100 80GB HBM3").name, chip_of("cpu")
      ('v5e', 'h100', None)
    """
    begins = [kind for kind in _KINDS if device_kind.lower().startswith(kind)]
    return CHIPS[_KINDS[max(begins, key=len)]] if begins else None
