"""The breakages of `mutants` in the backends: kernels/, csrc/ and what calls csrc/."""

CONTRACT = "tests/ops/test_contract.py -k"
TRITON = f"{CONTRACT} 'tiles and 64 and "
CUDA = f"{CONTRACT} 'emulated and "
CPU = f"{CONTRACT} 'DEFAULT and "

BY_FILE = {
    "svd_engine/ops/cuda.py": [
        (
            "return rows * -(-vocab // library.tile_tokens) *",
            "return rows * (vocab // library.tile_tokens) *",
            f"{CUDA}steer'",
        ),
    ],
    "svd_engine/ops/cpu.py": [
        (
            "draw.top_k, draw.top_p, draw.min_p, *draw.seed, *draw.position, token",
            "draw.top_k, draw.top_p, draw.min_p, *draw.seed, *draw.seed, token",
            f"{CPU}cut'",
        ),
    ],
    "kernels/reference.py": [
        (
            'torch.where(both, (p if direction == "projected" else 1) * (mean_d - d), 0.0)',
            '(p if direction == "projected" else 1) * (mean_d - d)',
            "tests/ops/test_reference.py",
        ),
        ("drop[:, 0] = False", "pass", "tests/ops/test_cpu.py -k cuts_keep"),
        (
            "away / max(temperature, 1.0) + min(temperature, 1.0) * noise",
            "away / max(temperature, 1.0) + noise",
            "tests/ops/test_reference.py -k sampling_follows",
        ),
        (
            "valid = stats.valid & strength.isfinite()",
            "valid = stats.valid",
            f"{CONTRACT} 'not_finite and reference'",
        ),
        (
            "position & mask, (position >> 32) & mask",
            "position & mask, position & 0",
            "tests/ops/test_reference.py",
        ),
        (
            "numerator = delta.gather(-1, target[:, None])[:, 0] - mean",
            "numerator = delta.gather(-1, target[:, None])[:, 0]",
            "tests/ops/test_reference.py",
        ),
    ],
    "kernels/triton_steer.py": [
        ("empty = 0.0 if DELTA else -INF", "empty = 0.0", f"{TRITON}steer and spoilt'"),
    ],
    "kernels/triton_sample.py": [
        (
            "first = comes_first(merit, token, other_merit, other_token)",
            "first = merit > other_merit",
            f"{TRITON}greedy and ties'",
        ),
        (
            "away / tl.maximum(temperature, 1.0) + noise * tl.minimum(temperature, 1.0)",
            "away / temperature + noise",
            f"{TRITON}coldest'",
        ),
        (
            "tl.store(place + 2 * count, best_logit)",
            "tl.store(place + 2 * count, best)",
            f"{TRITON}noisy and stretches'",
        ),
    ],
    "kernels/triton_blocks.py": [
        ("first + bit * CHUNK", "first + bit", "tests/ops/test_triton.py -k list_of_tiles"),
        ("cells > CAPACITY", "cells > 2 * CAPACITY", "tests/ops/test_triton.py -k elements_read"),
        ("lane // CHUNK % CELLS", "lane % CELLS", f"{TRITON}topk and rounded'"),
    ],
    "kernels/triton_cut.py": [
        (
            "fits = (before + place < top_k)",
            "fits = (place < top_k)",
            f"{TRITON}cut and equals and 72'",
        ),
        (
            "if (counted < top_k) & (summed < limit) & (reached >= low):",
            "if (counted < top_k) & (reached >= low):",
            f"{TRITON}cut and cuts and not equals'",
        ),
    ],
    "kernels/triton_topk.py": [
        (
            "after = comes_first(last, last_token, logits, token) & (logits > best)",
            "after = (logits < last) & (logits > best)",
            f"{TRITON}topk and rounded'",
        ),
    ],
    "kernels/triton_score.py": [
        (
            "tl.where(rest_sum_exp > 0, penalised(rest_peak, steering), LOWEST)",
            "tl.where(rest_sum_exp > 0, LOWEST, LOWEST)",
            f"{TRITON}score and pushed'",
        ),
        (
            "spread + other_spread + step * step * sum_p * share,",
            "spread + other_spread,",
            f"{TRITON}project and certain'",
        ),
    ],
    "kernels/triton_support.py": [
        (
            "moved = in_base * ((peaks - peak) - (base_peaks - base_peak))",
            "moved = in_base * (peaks - peak)",
            f"{TRITON}divergence and shifted'",
        ),
        (
            "slot = size + rank(kept)",
            "slot = size + rank(kept) + 1",
            f"{TRITON}64-support and float32'",
        ),
        (
            "listed = kept & (slot < capacity)",
            "listed = kept & (slot <= capacity)",
            f"{TRITON}64-support and capacity'",
        ),
    ],
    "kernels/triton_measure.py": [
        (
            '(e, tl.where(b > -INF, e, 0.0), tl.where(b < INF, e * d, float("nan"))), 0, add_3',
            '(e, e, tl.where(b < INF, e * d, float("nan"))), 0, add_3',
            f"{TRITON}steer and stretches'",
        ),
        (
            "tl.where(marked, 0.0, sums * factor)",
            "tl.where(marked, 0.0, factor)",
            f"{TRITON}project and certain'",
        ),
        (
            "peak += strength - strength  # NaN if the strength is not finite",
            "pass",
            f"{TRITON}not_finite'",
        ),
    ],
    "kernels/triton_rows.py": [
        (
            "return tl.where((z > -INF) & (b > -INF), z - b, 0.0)",
            "return tl.where(z > -INF, z - b, 0.0)",
            f"{TRITON}steer and stretches'",
        ),
    ],
    "kernels/triton_noise.py": [
        ("zero + (seed >> 32).to(tl.uint32)", "zero", "tests/ops/test_triton.py -k noise_is_the"),
    ],
    "kernels/launch.py": [
        ("(numbers + ROW.value + ENTRIES.value)", "numbers", f"{TRITON}greedy and stretches'"),
    ],
    "kernels/launch_linear.py": [
        (
            "if joined.is_plain and joined.tile()[2] == 1:",
            "if joined.is_plain:",
            "tests/ops/test_triton_linear.py -k any_size",
        ),
    ],
    "csrc/cuda/walk.h": [
        (
            "LogSumExp{tile.peak + shift, tile.sum_exp}",
            "LogSumExp{tile.peak, tile.sum_exp}",
            f"{CUDA}score'",
        ),
    ],
    "csrc/cuda/choose.h": [
        (
            "return before.count < to.top_k &&",
            "return before.count <= to.top_k &&",
            f"{CUDA}cut and equals and 72'",
        ),
        (
            "(b.merit == a.merit && b.token < a.token)",
            "(b.merit == a.merit && b.token > a.token)",
            f"{CUDA}greedy and ties'",
        ),
    ],
    "csrc/cuda/rows.h": [
        (
            "sums.sum_exp_in_base += base[j] > -INFINITY ? e : 0.0f;",
            "sums.sum_exp_in_base += e;",
            f"{CUDA}steer and stretches'",
        ),
        ("first += ahead * kWarp", "first = count", "tests/ops/test_cuda.py -k sums_of_many"),
    ],
    "csrc/cuda/score.h": [
        (
            "to.in_support[row.index] = valid && kept;",
            "to.in_support[row.index] = kept;",
            f"{CUDA}project and spoilt'",
        ),
        (
            "a.spread + b.spread + a.sum_exp * share * step * step",
            "a.spread + b.spread",
            f"{CUDA}project and certain'",
        ),
    ],
    "csrc/cuda/kernels.h": [
        (
            "is_valid(stats) && strength - strength == 0.0f",
            "is_valid(stats)",
            f"{CUDA}not_finite'",
        ),
        ("  __syncthreads();", "", "tests/ops/test_cuda.py -k in_place"),
    ],
    "csrc/cpu/rows.h": [
        (
            "sum_exp_in_base += b > -INFINITY ? e : Vec{};",
            "sum_exp_in_base += e;",
            f"{CPU}steer and stretches'",
        ),
    ],
    "csrc/cpu/row_ops.h": [
        (
            "(a.logit == b.logit && a.token < b.token)",
            "(a.logit == b.logit && a.token > b.token)",
            f"{CPU}topk and ties'",
        ),
        (
            "if (!std::isfinite(row.steering.strength)) measured",
            "if (false) measured",
            f"{CPU}not_finite'",
        ),
    ],
    "csrc/cpu/ops.cpp": [
        (
            "return data ? data[i * stride] : scalar;",
            "return data ? data[0] : scalar;",
            f"{CPU}steer and seventh'",
        ),
    ],
    "csrc/cpu/panels.h": [
        (
            "bias[1][i] = bias[0][i];",
            "bias[1][i] = 0;",
            "tests/model/test_linear.py -k every_number",
        ),
    ],
}
