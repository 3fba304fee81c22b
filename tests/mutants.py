"""Breakages of one line each, with the tests that must notice: `make mutants` tries them all.

A text occurs exactly once in its file. A breakage that no test notices is a gap of the tests.
"""

from typing import Any, NamedTuple


class Mutant(NamedTuple):
    file: str
    text: str
    broken: str  # what stands in its place
    tests: str  # arguments of pytest


CALIBRATE = "tests/calibration/test_calibrate.py -k"
ESTIMATORS = "tests/calibration/test_estimators.py -k"
SUPPORT_STATS = "tests/calibration/test_support_stats.py -k"
GENERATE = "tests/generation/test_generate.py -k"

BY_FILE = {
    "svd_engine/ops/checks.py": [
        ("if not -LARGEST <= value <= LARGEST:", "if value != value:", "tests/ops/test_checks.py"),
        ("if not 0 <= alpha <= 1:", "if alpha < 0 or alpha > 1:", "tests/ops/test_checks.py"),
        ("if not each.isfinite().all():", "if each.isinf().any():", "tests/ops/test_checks.py"),
        (
            "b_start + first * b_step < start + a_width:",
            "b_start + first * b_step < start:",
            "tests/ops/test_checks.py",
        ),
        (
            "if not (same and out.stride() == rows.stride())",
            "if not same",
            "tests/ops/test_checks.py",
        ),
        ("if low < 0 or high >= vocab:", "if low < 0 or high > vocab:", "tests/ops/test_checks.py"),
    ],
    "svd_engine/ops/dispatch.py": [
        ("next(able, reference)", "next(able)", "tests/ops/test_dispatch.py"),
    ],
    "svd_engine/ops/schema.py": [
        (
            "return next(leaves), next(leaves)",
            "return next(leaves), (next(leaves), None)[1]",
            "tests/ops/test_hidden_states.py -k equal",
        ),
    ],
    "svd_engine/ops/hidden_states.py": [
        ("some = (x[part] if", "some = (x[: len(x[part])] if", "tests/ops/test_hidden_states.py"),
    ],
    "svd_engine/generation/decode_loop.py": [
        (
            "self._positions = self._positions + 1",
            "self._positions = self._positions + 0",
            "tests/generation/test_draws.py",
        ),
        (
            "self._sample(drawn_from, self._seeds, self._positions)",
            "self._sample(drawn_from, self._seeds[:1].expand(len(self.rows)), self._positions)",
            "tests/generation/test_draws.py",
        ),
        (
            "self._tokens[index], self._seeds[index]",
            "self._tokens[index], self._seeds[: len(index)]",
            "tests/generation/test_draws.py",
        ),
        (
            "self._positions = self._positions[index]",
            "self._positions = self._positions[: len(index)]",
            "tests/generation/test_draws.py",
        ),
    ],
    "svd_engine/generation/sequence.py": [
        (
            "is_full = len(self.token_ids) == self.max_new_tokens",
            "is_full = len(self.token_ids) > self.max_new_tokens",
            "tests/generation/test_sequence.py -k limit",
        ),
        (
            "token_id if token_id in self.eos_token_ids else None",
            "None",
            "tests/generation/test_sequence.py",
        ),
    ],
    "svd_engine/generation/beam_search.py": [
        (
            "beam.total / length**self.sampling.length_penalty",
            "beam.total / length",
            "tests/generation/test_beam_search.py -k transformers",
        ),
        (
            "count = max(2, 1 + len(sequences[0].eos_token_ids)) * width",
            "count = width",
            "tests/generation/test_beam_search.py -k transformers",
        ),
        (
            "grown.append((beam.total + score, row, beam, token, score))",
            "grown.append((score, row, beam, token, score))",
            "tests/generation/test_beam_search.py -k transformers",
        ),
    ],
    "svd_engine/generation/scoring.py": [
        (
            "padded([p.completion[:-1] for p in passages])",
            "padded([p.completion[1:] for p in passages])",
            "tests/generation/test_scoring.py",
        ),
    ],
    "svd_engine/generation/top_logprobs.py": [
        (
            '"base": unsteered(base)}',
            '"base": unsteered(adapted)}',
            "tests/generation/test_request.py -k top_logprobs",
        ),
    ],
    "svd_engine/generation/detokenizer.py": [
        (
            "return min(ends)[1:] if ends else None",
            "return max(ends)[1:] if ends else None",
            "tests/generation/test_detokenizer.py -k which",
        ),
    ],
    "svd_engine/generation/distribution.py": [
        (
            "(logits[0], logits[-1], steering.strength)",
            "(logits[-1], logits[0], steering.strength)",
            f"{GENERATE} ragged",
        ),
        (
            "direction=steering.direction",
            'direction="projected"',
            "tests/calibration/test_direction.py -k greedy",
        ),
    ],
    "svd_engine/model/adapter_layers.py": [
        ("return x.shape[0] // 2 if self.paired else 0", "return 0", f"{GENERATE} ragged"),
        (
            "return Halves(base, adapted)",
            "return adapted",
            "tests/model/test_peft_adapter.py -k many_methods",
        ),
    ],
    "svd_engine/model/adapter_terms.py": [
        ("_copy(up * scale), up_bias)", "_copy(up), up_bias)", f"{GENERATE} ragged"),
        (
            "return (dora.weight / norm)",
            "return dora.weight",
            "tests/model/test_peft_adapter.py -k many_methods",
        ),
        (
            "return plain if type(plain) is type(base) and error < MERGED else None",
            "return base",
            "tests/model/test_peft_adapter.py -k many_methods",
        ),
        (
            "        if not norm.all():",
            "        if False:",
            "tests/model/test_peft_adapter.py -k magnitude",
        ),
    ],
    "svd_engine/model/kv_cache.py": [
        ("memory[:size].zero_()", "pass", "tests/model/test_runner.py -k memory"),
        (
            "= buffer[index[moved], :, :kv_length]",
            "= buffer[moved, :, :kv_length]",
            "tests/generation/test_beam_search.py -k transformers",
        ),
    ],
    "svd_engine/model/runner.py": [
        ("self.positions += length", "self.positions += 0", f"{GENERATE} ragged"),
    ],
    "svd_engine/ops/head.py": [
        (
            "softcap * torch.tanh(x / softcap)",
            "softcap * torch.tanh(x)",
            "tests/model/test_layers.py -k softcap",
        ),
    ],
    "svd_engine/model/layers/attention.py": [
        ("outside = slots <= position_ids", "outside = slots < position_ids", f"{GENERATE} ragged"),
    ],
    "svd_engine/calibration/calibrate.py": [
        (
            "strength = chosen.estimate(inside)",
            "strength = chosen.estimate(inside | outside)",
            f"{CALIBRATE} held_out",
        ),
        (
            "chosen = best_fit(fitted, fold, inside)",
            "chosen = best_fit(fitted, fold, inside | outside)",
            f"{CALIBRATE} held_out",
        ),
        (
            "gains, gain_weights = np.append(gains, -cost)",
            "gains, gain_weights = np.append(gains, cost)",
            f"{CALIBRATE} never_suffers",
        ),
    ],
    "svd_engine/calibration/cross_validation.py": [
        (
            "self.nearest(among & ~part if",
            "self.nearest(among if",
            f"{CALIBRATE} held_out",
        ),
    ],
    "svd_engine/calibration/estimators.py": [
        ("<= FLAT * counts.sum(-1)", "< 0 * counts.sum(-1)", f"{CALIBRATE} strength"),
        ("cut = int(TRIM * len(ratios))", "cut = 0", f"{ESTIMATORS} by_hand"),
    ],
    "svd_engine/calibration/objectives.py": [
        (
            "share = 1 / np.bincount(owner, minlength=count)[owner]",
            "share = np.ones(len(owner))",
            f"{ESTIMATORS} mean_over_pairs",
        ),
    ],
    "svd_engine/calibration/support_stats.py": [
        (
            "kept = self.p >= alpha * top[self.position]",
            "kept = self.p >= alpha",
            f"{SUPPORT_STATS} larger_alpha",
        ),
        ("+ left * mean.square()", "", f"{SUPPORT_STATS} projections"),
        (
            "left = (1 - self._per_token(self.p)).clamp(0) * torch.exp(-top)",
            "left = 0.0 * top",
            f"{SUPPORT_STATS} overflow",
        ),
    ],
    "svd_engine/training/trainer.py": [
        (
            "labels = [-100] * len(example.prompt) + [*answer, *end]",
            "labels = [*example.prompt, *answer, *end]",
            "tests/training/test_warm_start.py -k looks_at",
        ),
        (
            '"labels": fill("labels", -100)',
            '"labels": fill("labels", 0)',
            "tests/training/test_warm_start.py -k accumulated",
        ),
        (
            "in sorted(found.items(), reverse=True):",
            "in sorted(found.items()):",
            "tests/training/test_warm_start.py -k killed",
        ),
        ("parameter.copy_(saved[name])", "pass", "tests/training/test_warm_start.py -k killed"),
    ],
    "svd_engine/evaluate/metrics.py": [
        (
            "float(scores[right[0]] > worst)",
            "float(scores[list(right)].max() > worst)",
            "tests/evaluate/test_metrics.py",
        ),
        (
            "odds[: len(right)].sum() / odds.sum()",
            "odds[: len(right)].max() / odds.sum()",
            "tests/evaluate/test_metrics.py",
        ),
    ],
    "svd_engine/evaluate/verdicts.py": [
        (
            "if answer else [True, False]",
            "if answer else [True, True]",
            "tests/evaluate/test_judge.py -k by_hand",
        ),
    ],
    "svd_engine/evaluate/journal.py": [
        ("os.truncate(path, whole)", "pass", "tests/evaluate/test_run.py -k killed"),
    ],
    "svd_engine/utils/bootstrap.py": [
        (
            "means = resamples(len(values), seed) @ values / len(values)",
            "means = resamples(len(values), seed) @ values / len(values) + 0.01",
            "tests/evaluate/test_run.py -k paired",
        ),
    ],
}


def mutants(*lists: Any) -> list[Mutant]:
    """Return those of several lists by file."""
    found = [item for by_file in lists for item in by_file.items()]
    return [Mutant(file, *breakage) for file, several in found for breakage in several]
