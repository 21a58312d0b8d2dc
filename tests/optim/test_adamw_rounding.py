"""Stored forms of weights and moments: exact where they claim to be, unbiased where they round stochastically."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from srpo_kernels.optim import reference as ref

_STREAMS = (ref.WEIGHT_STREAM, ref.SECOND_STREAM)


def _fp32(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def test_split_is_inverted_exactly_for_all_upper_halves() -> None:
    """All 2^16 upper halves with ties, neighbours of ties, extremes and random lower halves."""
    special = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    lower = torch.tensor(special + torch.randint(0, 65536, (200,), generator=torch.Generator().manual_seed(0)).tolist())
    for part in torch.arange(-32768, 32768).split(8192):
        bits = ((part[:, None] << 16) | lower).to(torch.int32)
        weight, remainder = ref.split16(bits.view(torch.float32))
        assert weight.dtype == torch.bfloat16
        assert remainder.dtype == torch.int16
        assert torch.equal(ref.join16(weight, remainder).view(torch.int32), bits)
        x = bits.view(torch.float32)
        finite = x.isfinite()
        # The model's half is torch's cast, but for ties, which go away from zero.
        differs = (weight.view(torch.int16) != x.bfloat16().view(torch.int16)) & finite
        assert (remainder[differs] == -32768).all()
        ties = finite & (remainder == -32768)
        assert (weight.float().abs()[ties] > x.abs()[ties]).all()


def test_split_differs_from_a_cast_for_few_weights_by_one_ulp() -> None:
    x = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    weight, _ = ref.split16(x)
    difference = weight.view(torch.int16).int() - x.bfloat16().view(torch.int16).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() <= 2e-5


def test_split24_keeps_what_it_can_hold_and_is_split_of_a_rounded_weight() -> None:
    x = 0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    held = (x.view(torch.int32) & ~0xFF).view(torch.float32)
    random = torch.randint(0, 65536, x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    weight, remainder = ref.split24(held, random)
    assert remainder.dtype == torch.int8
    assert torch.equal(ref.join24(weight, remainder), held)
    rounded = ref.join24(*ref.split24(x, random))
    assert torch.equal(rounded, ref.round_down_bits(x, random, 8))
    assert ((rounded - x).abs() <= x.abs() * 2.0**-15).all()


@pytest.mark.parametrize("dropped", [8, 16])
def test_stochastic_rounding_leaves_special_values(dropped: int) -> None:
    everything = torch.full((9,), (1 << dropped) - 1, dtype=torch.int32)
    largest_held = _fp32(torch.tensor(0x7F7FFFFF & ~((1 << dropped) - 1)))
    x = torch.tensor(
        [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 3.4028234663852886e38, -3.4028234663852886e38, math.nan]
    )
    rounded = ref.round_down_bits(x, everything, dropped)
    assert torch.equal(rounded[:6], x[:6])
    assert torch.signbit(rounded[1])
    assert rounded[6] == largest_held
    assert rounded[7] == -largest_held
    assert rounded[8].isnan()
    assert ref.round_down_bits(_fp32(torch.tensor([0x7F800001])), everything[:1], dropped).isnan().all()


@pytest.mark.parametrize("dropped", [8, 16])
def test_stochastic_rounding_is_unbiased(dropped: int) -> None:
    """Over 1e5 draws: the mean within 4 sigma, and how often up by chi-squared."""
    draws = 100_000
    words = ref.random_bits(7, ref.WEIGHT_STREAM, torch.tensor(3), 0, 40 * draws).view(40, draws)
    x = torch.randn(40, generator=torch.Generator().manual_seed(2)).abs() + 0.01
    rounded = ref.round_down_bits(x[:, None].expand(-1, draws).contiguous(), words, dropped).double()
    low = _fp32(x.view(torch.int32) & ~((1 << dropped) - 1)).double()
    high = _fp32((x.view(torch.int32) & ~((1 << dropped) - 1)) + (1 << dropped)).double()
    chance = (x.double() - low) / (high - low)
    assert ((rounded == low[:, None]) | (rounded == high[:, None])).all()
    ups = (rounded == high[:, None]).double().sum(1)
    sigma = (draws * chance * (1 - chance)).sqrt().clamp(min=0.5)
    assert ((ups - draws * chance).abs() <= 4 * sigma).all()
    chi_squared = (((ups - draws * chance) / sigma).square()).sum().item()
    assert chi_squared < 82.1  # 40 degrees of freedom, p = 1e-4


def test_root_codes_are_unbiased() -> None:
    draws = 100_000
    value = torch.rand(60, generator=torch.Generator().manual_seed(2)) ** 6
    x = torch.cat([value, torch.ones(1)])[None].expand(draws, -1).contiguous()
    random = ref.random_bits(7, ref.SECOND_STREAM, torch.tensor(3), 0, x.numel()).view(x.shape)
    codes, scale = ref.encode_roots(x, random)
    decoded = ref.decode_roots(codes, scale).double()
    spread = decoded.std(0).clamp(min=1e-12)
    assert ((decoded.mean(0) - x[0]).abs() <= 4 * spread / math.sqrt(draws) + 2.0**-17 * spread + 1e-9 * x[0]).all()
    assert (codes.amax(0).int() - codes.amin(0).int()).max() == 1


def test_root_codes_stay() -> None:
    """Every code of a block that holds its largest one is encoded as itself, whatever the random bits."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).flip(0)
    codes[:, 0] = 255
    for power in (-60, 0, 60):
        decoded = ref.decode_roots(codes, torch.full((2, 1), 2.0**power))
        for random in (0, 0xFFFF):
            again, scale = ref.encode_roots(decoded, torch.full((2, 128), random, dtype=torch.int32))
            assert torch.equal(again, codes)
            assert (scale == 2.0**power).all()


def test_zero_has_code_zero_and_nothing_else() -> None:
    x = torch.tensor([[0.0, 1e-30, 1.0, 0.0]])
    codes, _ = ref.encode_roots(x, torch.zeros(1, 4, dtype=torch.int32))
    assert codes.tolist() == [[0, 1, 255, 0]]
    assert ref.decode_roots(*ref.encode_roots(torch.zeros(2, 130), torch.zeros(2, 130, dtype=torch.int32))).eq(0).all()
    assert ref.decode_blocks(*ref.encode_blocks(torch.zeros(2, 130))).eq(0).all()


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e30])
def test_block_codes_are_e4m3_of_a_power_of_two(columns: int, magnitude: float) -> None:
    x = magnitude * torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    codes, scale = ref.encode_blocks(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert scale.shape == (5, -(-columns // 128))
    for block in range(scale.shape[1]):
        part = x[:, 128 * block : 128 * (block + 1)].double()
        power = torch.ceil(torch.log2(part.abs().amax(1, keepdim=True)))
        assert torch.equal(scale[:, block : block + 1].double(), 2.0 ** (power - 8))
        wanted = (part / 2.0 ** (power - 8)).float().to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(codes[:, 128 * block : 128 * (block + 1)], wanted)
    again = ref.decode_blocks(*ref.encode_blocks(ref.decode_blocks(codes, scale)))
    assert torch.equal(again, ref.decode_blocks(codes, scale))


def _drawn(element: int, stream: int, step: int, seed: int) -> int:
    """The 16 bits of an element, from Philox4x32-7 (Salmon et al. 2011) in Python's integers."""
    counter = element // 16
    c = [counter & 0xFFFFFFFF, counter >> 32, step, stream]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = sum(word << 32 * place for place, word in enumerate(c))
    if element % 16 >= 8:
        bits = bits >> 8 | (bits & 0xFF) << 120
    return bits >> 16 * (element % 8) & 0xFFFF


@pytest.mark.parametrize("stream", _STREAMS)
def test_random_bits_are_philox_by_element(stream: int) -> None:
    seed, step, start = 2**40 + 5, 9, 16 * 2**33 + 3
    bits = ref.random_bits(seed, stream, torch.tensor(float(step)), start, 40).tolist()
    assert bits == [_drawn(n, stream, step, seed) for n in range(start, start + 40)]


def test_random_bits_are_uniform_and_shared_bytes_correlate_little() -> None:
    """Every bit's mean within 4 sigma; elements 8 apart share a byte, one's high and the other's low: 1/256."""
    count = 1 << 20
    drawn = {stream: ref.random_bits(11, stream, torch.tensor(2), 0, count) for stream in _STREAMS}
    for bits in drawn.values():
        ones = torch.stack([(bits >> bit & 1).double().mean() for bit in range(16)])
        assert ((ones - 0.5).abs() <= 4 * 0.5 / count**0.5).all()
    groups = drawn[ref.WEIGHT_STREAM].view(-1, 16).double()
    correlation = torch.corrcoef(groups.T) - torch.eye(16)
    assert correlation.abs().max() <= 1 / 256 + 4 / len(groups) ** 0.5
    streams = torch.corrcoef(torch.stack([bits.double() for bits in drawn.values()]))
    assert streams[0, 1].abs() <= 4 / count**0.5


@pytest.mark.parametrize("piece", [64, 1000])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_random_bits_and_norms_do_not_depend_on_pieces(piece: int, shards: int) -> None:
    step, rows, columns = torch.tensor(2), 37, 1500
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 1e-6
    whole, random = ref.sums_of_squares(x)[0], ref.random_bits(3, ref.WEIGHT_STREAM, step, 17, x.numel())
    bins, pieces, first = torch.zeros_like(whole), [], 0
    for shard in x.chunk(shards):
        bins += ref.sums_of_squares(shard)[0]
        for start in range(0, shard.numel(), piece):
            size = min(piece, shard.numel() - start)
            pieces.append(ref.random_bits(3, ref.WEIGHT_STREAM, step, 17 + first + start, size))
        first += shard.numel()
    assert torch.equal(bins, whole)
    assert torch.equal(torch.cat(pieces), random)


@pytest.mark.parametrize("columns", [1, 3, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("magnitude", [1e-18, 1e-9, 1.0, 1e15])
def test_sum_of_squares_is_exact_in_its_order(columns: int, magnitude: float) -> None:
    x = magnitude * torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    bins, lost = ref.sums_of_squares(x)
    padded = np.zeros((3, -(-columns // 1024) * 1024), np.float32)
    padded[:, :columns] = (x * x).numpy()
    sums = padded.reshape(-1, 1024)
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    assert ref.total(bins).item() == pytest.approx(math.fsum(sums[:, 0].tolist()), rel=1e-15)
    assert lost == 0


def test_chunks_that_are_not_finite_are_counted() -> None:
    x = torch.zeros(4, 2048)
    x[0, 3] = math.nan
    x[1, 2000] = -math.inf
    x[2, 7] = 1e30  # its square overflows
    assert ref.sums_of_squares(x)[1] == 3


def test_powers_are_those_of_float64() -> None:
    steps = torch.tensor([1, 2, 3, 20, 1500, 2**23 + 1])
    found = ref.scalars(steps, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    for step, numbers in zip(steps.tolist(), found, strict=True):
        assert numbers.rate == torch.tensor(1e-3 / (1 - 0.9**step))
        assert numbers.root == torch.tensor(1 / math.sqrt(1 - 0.999**step))
        assert numbers.decay == torch.tensor(1e-3 * 0.01)
