"""Do the tests notice a fault? One small fault after the other goes into a copy of the repository, and tests run there.

    python tests/mutants.py                     # all, an hour on one core; prints who survived and the share by section
    python tests/mutants.py --only heun         # those of this section (E, own), or whose file, text or tests hold it
    python tests/mutants.py --list              # without a run: which anchors are stale (their text is not there once)

Nothing beside the repository is copied: the original implementations' numbers are absent, so the repository's own tests
must notice. A killed mutant is right. Section E: faults that once survived; own: others of the same kinds.
A row: (section, old text, new text, tests); the old text occurs once in its file, or once in all files (then it has moved
and is followed), else it is stale: no run, and it is said. Tests: words of test files
("crpo": tests/test_crpo.py), "golden:NAME" for one golden; test_faults.py is always the first.
Workers are forked with torch loaded: a kill costs a few seconds.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from house import sources

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", "runs", "cache", "out", "preview", "docs")
SECONDS = 240           # of one mutant

MUTANTS = {
    "sample.py": [
        ("E", "velocity_fn(x + (t_next - t) * slope, t_next)", "velocity_fn(x + (t_next - t) * slope, t)", "sample"),
        ("E", "generator=generator(seed, index))", "generator=generator(seed + index))", "sample golden:noise_and_schedule"),
        ("own", "torch.linspace(1.0, 1.0 / steps, steps", "torch.linspace(1.0, 1.0 / (steps + 1), steps",
         "sample golden:noise_and_schedule"),
        ("own", "x = x + (t_next - t) * velocity_fn(x, t)", "x = x + (t - t_next) * velocity_fn(x, t)", "sample"),
        ("own", "uncond, cond = velocity.chunk(2)", "cond, uncond = velocity.chunk(2)", "sample"),
        ("own", "if sampling.guidance_scale != 1:", "if sampling.guidance_scale > 1:", "sample"),
        ("own", "random.manual_seed(seed)) for n in counts", "random.manual_seed(seed + n)) for n in counts",
         "sample golden:noise_and_schedule"),
        ("own", "max(1, int(seconds * codec.sampling_rate))", "max(1, round(seconds * codec.sampling_rate))", "sample"),
        ("own", "math.ceil(max(samples[rows]) / codec.hop)", "math.ceil(min(samples[rows]) / codec.hop)", "sample"),
        ("own", "rewards.nan_to_num(-torch.inf).argmax()", "rewards.argmax()", "sample"),
        ("own", "model.codec.denormalise(latents)", "model.codec.normalise(latents)", "sample golden:euler_base"),
        ("own", "return min(10.0, float(math.floor(max_duration)) or max_duration)",
         "return max(10.0, float(math.floor(max_duration)) or max_duration)", "sample"),
    ],
    "train_fm.py": [
        ("E", "(step * args.processes + rank) * args.batch_size", "(step * args.processes + rank) * args.batch_size + 1", "train_fm"),
        ("E", 'generator(seed, "order", epoch)', 'generator(seed, "order")', "train_fm golden:noise_and_schedule"),
        ("E", "x1 = mean + std * eps", "x1 = mean", "train_fm golden:fm_validation"),
        ("E", "codec.normalise(x1.to(device))", "x1.to(device)", "train_fm golden:fm_validation"),
        ("E", "args.clip or math.inf", "math.inf", "train_fm"),
        ("E", "args.learning_rate, args.warmup_steps, args.steps", "args.learning_rate, 1, args.steps", "train_fm"),
        ("E", '"linear" if args.decay else "constant"', '"linear"', "train_fm experts"),
        ("E", "experts * args.oversample", "experts * 5", "train_fm experts"),
        ("E", "(step * args.processes + rank) * args.batch_size", "step * args.processes * args.batch_size", "train_fm"),
        ("E", ".sigmoid()[order]", ".sigmoid()", "train_fm golden:fm_validation"),
        ("E", "rows += cache.rows[len(rows):]", 'rows += [{"score": None}] * len(cache.rows[len(rows):])', "train_fm"),
        ("E", 'widths[0] if args.save_weights == "power" else ""', 'widths[0] if widths else ""', "train_fm averages"),
        ("own", "1 - u, grid) if grid", "u, grid) if grid", "train_fm"),
        ("own", "grid - torch.floor(grid * u)", "grid - torch.ceil(grid * u)", "train_fm"),
        ("own", "(1 - t) * x1 + t * x0, x0 - x1", "(1 - t) * x1 + t * x0, x1 - x0", "train_fm"),
        ("own", "text = text * ~batch.drop_text", "text = text * batch.drop_text", "train_fm"),
        ("own", '(null == "empty_prompt")', '(null != "")', "train_fm"),
        ("own", "drop_text = draws[:, 0] < dropout", "drop_text = draws[:, 0] < score_dropout", "train_fm"),
        ("own", "torch.where(drop_text | drop_score, null_score(score)", "torch.where(drop_score, null_score(score)", "train_fm"),
        ("own", 'generator("validation", i) for i', 'generator("validation") for i', "train_fm golden:fm_validation"),
        ("own", "with weights_replaced(parameters, averages[\"\"])", "with weights_replaced(parameters, parameters)", "train_fm"),
        ("own", "known.std(correction=0)", "known.std(correction=1)", "train_fm"),
        ("own", "math.ceil(args.epochs * len(data.rows)", "math.floor(args.epochs * len(data.rows)", "train_fm"),
        ("own", "args.batch_size * args.processes))", "args.batch_size))", "train_fm"),
        ("own", "fifths = (torch.cat(ts) * 5)", "fifths = (torch.cat(ts) * 4)", "train_fm golden:fm_validation"),
        ("own", "betas = args.beta1, args.beta2", "betas = args.beta2, args.beta1", "train_fm"),
        ("own", "batch.t, text, *rest", "1 - batch.t, text, *rest", "train_fm golden:fm_validation"),
    ],
    "lib/weights.py": [
        ("E", "average_decay(step - 1, ema)", "average_decay(step, ema)", "train_fm averages"),
        ("E", "list(parameters.values()), 1 - decay)", "list(parameters.values()), decay)", "train_fm averages"),
        ("own", "power_decay(step, gamma_of(width))", "power_decay(step + 1, gamma_of(width))", "averages"),
        ("own", "if p.ndim < 2], \"weight_decay\": 0.0", "if p.ndim < 2], \"weight_decay\": weight_decay", "train_fm"),
        ("own", "peak * ((step + 1) / warmup)", "peak * (step / warmup)", "lib_common"),
        ("own", 'rate * group.get("scale", 1.0)', "rate", "train_fm"),
        ("own", "max(1, p.shape[0] / p.shape[1])", "max(1, p.shape[1] / p.shape[0])", "lib_common"),
        ("own", "if row[\"step\"] <= step]", "if row[\"step\"] < step]", "lib_common"),
    ],
    "lib/common.py": [
        ("E", "tensor /= ranks", "pass", "train_fm lib_common"),
        ("own", 'digest[:8], "little") >> 1', 'digest[:8], "big") >> 1', "golden:noise_and_schedule"),
        ("own", "rows[:len(rows) // size * size]", "rows[:len(rows)]", "lib_common"),
        ("own", "if kind in (int, float) and not low <= value <= high", "if kind in (int, float) and not low < value <= high",
         "lib_common"),
    ],
    "model.py": [
        ("E", '{**new, **flow.config, "score_head": head}', '{**flow.config, **new, "score_head": head}', "score"),
        ("E", "(score.float() - self.config.score_mean) / self.config.score_std",
         "(score.float() - self.config.score_mean)", "score golden:score_heads"),
        ("own", "cycle([F.silu(temb) for temb in tembs])", "cycle([F.silu(tembs[0])])",
         "score golden:score_heads"),
        ("own", "self.norm_out(next(tembs))", "self.norm_out(F.silu(self.time_text_embed(t, pooled)))", "score golden:score_heads"),
        ("own", "scale, shift = self.norm_out", "shift, scale = self.norm_out", "model golden:euler_base"),
        ("own", "x[:, -frames:], shift", "x[:, :frames], shift", "model golden:euler_base"),
        ("own", "(tokens, 0))           # (N,)", "(0, tokens))           # (N,)", "model golden:euler_base"),
        ("own", "with_visible(condition.mask, 0, 1)", "with_visible(condition.mask, 1, 0)", "model"),
        ("own", "duration.float().clamp(0, self.max_duration)", "duration.float().clamp(max=self.max_duration)", "model"),
        ("own", '"transformer.proj_out", "score_embed.linear_2")', '"transformer.proj_out")', "model score"),
        ("own", "real.sum(1).clamp(min=1)", "real.shape[1]", "model golden:euler_base"),
        ("own", 'if self.config.score_null == "zero":', 'if self.config.score_null:', "score"),
    ],
    "crpo.py": [
        ("E", "share = len(positions) / count", "share = training.micro_batch / count", "crpo"),
        ("E", "torch._foreach_add(total, gradients) if total else gradients", "gradients", "crpo"),
        ("E", "math.ceil(how.epochs * len(rows) / how.batch_size)", "math.floor(how.epochs * len(rows) / how.batch_size)", "crpo"),
        ("E", "**dict(zip(scorers, values))}", "**dict(zip(scorers, values[::-1]))}", "experts"),
        ("own", "if settings.shared_noise:", "if not settings.shared_noise:", "crpo"),
        ("own", "drop_text | drop_score, null_score", "drop_score, null_score", "crpo experts"),
        ("own", 'generator(seed, "prompts", iteration)', 'generator(seed, "prompts")', "crpo"),
        ("own", "average_decay(step, how.ema)", "average_decay(step + 1, how.ema)", "crpo golden:run_crpo"),
        ("own", "settings._replace(dropout=0.0, score_dropout=0.0)", "settings._replace(score_dropout=0.0)", "crpo"),
        ("own", "reference = copy.deepcopy(flow).requires_grad_(False)", "reference = flow", "crpo"),
        ("own", "min(how.warmup_steps, max(1, steps // 4))", "how.warmup_steps", "crpo"),
        ("own", "min(row[\"duration\"] or default_duration(max_duration), max_duration)",
         "row[\"duration\"] or default_duration(max_duration)", "crpo"),
        ("own", "position // count, count)[position % count]", "0, count)[position % count]", "crpo"),
        ("own", 'data["mean"][row] + data["std"][row] * eps', 'data["mean"][row]', "faults"),
    ],
    "lib/losses.py": [
        ("own", "logits = -half * beta", "logits = half * beta", "crpo"),
        ("own", "fm_weight * winner.mean()", "fm_weight * loser.mean()", "crpo"),
        ("own", "(1 - mu) * square / dot", "mu * square / dot", "losses"),
        ("own", "torch.where(dot > 0,", "torch.where(dot < 0,", "losses"),
        ("own", "mean(1, keepdim=True).sqrt()", "mean(1, keepdim=True)", "losses"),
        ("own", "image_error(old - change", "image_error(old + change", "losses"),
        ("own", "size = miss.detach().abs()", "size = miss.abs()", "losses"),
        ("own", "r * positive + (1 - r) * negative", "r * positive + r * negative", "losses"),
        ("own", "settings.beta * A * (E - E_old)", "settings.beta * A * (E_old - E)", "losses"),
        ("own", "errors(velocity, target).view(count, -1).T", "errors(velocity, target).view(-1, count)", "losses"),
        ("own", "x + (1 - t) * velocity", "x - (1 - t) * velocity", "losses"),
        ("own", "sigma ** 2 / (2 * t) * x0_hat", "sigma ** 2 / (2 * t) * x0_hat * 0.8", "losses"),
        ("own", "sigma * (t - t_next).sqrt()", "sigma * (t - t_next)", "losses"),
        ("own", "torch.minimum(ratio * A", "torch.maximum(ratio * A", "losses"),
        ("own", "clamp(max=steps - 2)", "clamp(max=steps - 1)", "losses"),
    ],
    "reward.py": [
        ("E", "np.isfinite(scores).all(1)", "np.isfinite(scores).any(1)", "reward"),
        ("own", "best[:, k]] > scores", "best[:, k]] >= scores", "reward"),
        ("own", "np.argsort(scores, axis=1, kind=\"stable\")", "best[:, ::-1]", "reward"),
        ("own", "loser_std\"]], 1) / scale", "loser_std\"]], 1)", "faults"),
        ("own", '"loser": prompts * count + worst', '"loser": prompts * count + best', "crpo"),
        ("own", "j in range(0, count, size)", "j in range(0, count)", "losses"),
    ],
    "ranker.py": [
        ("own", "utility_a - utility_b, preference", "utility_b - utility_a, preference", "reward golden:ranker"),
        ("own", "(self.utility(features) - self.score_mean)", "self.utility(features)", "reward golden:ranker"),
        ("own", "audio.shape[-1]).mean(0) for audio", "audio.shape[-1])[0] for audio", "reward"),
        ("own", "text *= torch.tensor([[bool(prompt)]", "text *= torch.tensor([[True]", "reward"),
        ("own", "/ self.std).clamp(-6, 6)", "/ self.std)", "reward"),
    ],
    "evaluate.py": [
        ("E", "np.cov(b.T, dtype=float)", "np.cov(b.T, dtype=float, ddof=0)", "evaluate golden:numbers"),   # for the t-test
        ("own", "(log_p - (q + smallest).log())", "((q + smallest).log() - log_p)", "evaluate golden:numbers"),
        ("own", "np.nanpercentile(values, [2.5, 97.5]", "np.nanpercentile(values, [5, 95]", "evaluate golden:tallies"),
        ("own", "else ours - theirs", "else theirs - ours", "evaluate"),
        ("own", "clip[:int(each.duration * rate)] for clip", "clip for clip", "evaluate"),
        ("own", "0 > change_of(\"judge\", before, now)[1]", "0 > change_of(\"judge\", before, now)[0]", "evaluate"),
        ("own", "losses.get(\"winner\", 0) > 1.05 * losses", "losses[\"winner\"] > 1.5 * losses", "crpo"),
        ("own", "verdicts[name] for name in pooled]", "verdicts[name] for name in pooled[:1]]", "evaluate"),
    ],
    "expert_iteration.py": [
        ("own", "(values - values.mean()) / (values.std() or 1.0)", "values / (values.std() or 1.0)", "experts"),
        ("own", "np.argsort(-blend", "np.argsort(blend", "experts"),
        ("own", '"score": rows[i]["reward"]}', '"score": rows[i]["blend"]}', "experts"),
        ("own", 'checkpoint=str(folder / "tuned")', "checkpoint=policy", "experts"),
        ("own", 'derive_seed(args.seed, "round", k)', 'derive_seed(args.seed, "round")', "experts"),
        ("own", "decay=False, ema=0.99", "decay=True, ema=0.99", "experts"),
    ],
    "vae.py": [
        ("own", "generator=random) * multiple", "generator=random)", "vae"),
        ("own", "loss.item() * len(batch)", "loss.item()", "vae"),
        ("own", 'generator(args.seed, "noise", step)', 'generator(args.seed, "noise")', "vae golden:run_vae"),
        ("own", 'row[which], "duration": row["duration"]', 'row["winner"], "duration": row["duration"]', "crpo vae"),
        ("own", "weights.get(name, 1.0) * part", "part", "vae golden:run_vae"),
    ],
    "data.py": [
        ("own", "min(seconds, row.get(\"duration\") or seconds)", "row.get(\"duration\") or seconds", "data"),
        ("own", "array[np.add(good, done)]", "array[good]", "data"),
        ("own", "states[offsets[i]:offsets[i + 1]]).float()", "states[offsets[i]:offsets[i + 1] - 1]).float()", "data"),
        ("own", "np.concatenate([cache.std, np.zeros_like(latents)])", "np.concatenate([cache.std, np.ones_like(latents)])",
         "train_fm"),
        ("own", "held_out = min(max(held_out, 1), len(place) - 1)", "held_out = min(max(held_out, 1), len(place))", "data"),
    ],
    "lib/audio.py": [
        ("E", "both = torch.cat([audio, between], dim=1)", "both = audio", "lib_audio"),
        ("own", "(distance / reach) ** 2).clamp(min=0).sqrt()", "(distance / reach) ** 2).clamp(min=0)", "lib_audio golden:resampled"),
        ("own", "surplus // 2 if crop", "surplus if crop", "lib_audio"),
        ("own", "(audio.clamp(-1, 1) * 32767)", "(audio * 32767)", "lib_audio"),
        ("own", "gain = min(10 ** ((target - before) / 20), highest)", "gain = 10 ** ((target - before) / 20)", "lib_audio"),
        ("own", "third[len(third) // 2]", "third[0]", "mel"),
    ],
    "lib/mel.py": [
        ("own", "keepdim=True) - 60).float()", "keepdim=True) - 90).float()", "mel"),
        ("own", "0.5 * mean ** 2 + std ** 2", "0.5 * (mean ** 2 + std ** 2)", "mel golden:mel_codec"),
        ("own", "std.square().mean((0, 1))).sqrt()", "std.mean((0, 1))).sqrt()", "mel"),
        ("own", "share.square().mean().sqrt() / share", "share / share.square().mean().sqrt()", "mel"),
        ("own", "rebuilt - 0.99 / 1.99 * previous", "rebuilt + 0.99 / 1.99 * previous", "mel golden:mel_codec"),
    ],
    "lib/oobleck.py": [
        ("own", "F.softplus(scale) + 1e-4", "F.softplus(scale)", "oobleck golden:oobleck"),
        ("own", "variance - variance.log() - 1", "variance - variance.log()", "oobleck golden:oobleck"),
        ("own", "max(3 - low, high + 3)", "max(2 - low, high + 2)", "oobleck"),
        ("own", "target.norm(dim=(1, 2))\n", "ours.norm(dim=(1, 2))\n", "oobleck"),
    ],
    "lib/text.py": [
        ("own", "(positions == 0).repeat(len(lengths), 1)", "(positions <= 1).repeat(len(lengths), 1)", "model"),
        ("own", "clamp(min=ids.shape[1])", "clamp(max=ids.shape[1])", "sample model"),
        ("own", "score = null_score(condition.score)", "score = condition.score", "score"),
    ],
    "lib/fast.py": [
        ("own", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1", "model fast"),
        ("own", "masked_fill(~visible, -torch.inf)", "masked_fill(visible, -torch.inf)", "model fast"),
    ],
    "world/train_ranker.py": [
        ("E", "if held < lowest:", "if held:", "reward"),
        ("E", "np.where(a == b, a, -1)", "a", "reward"),
        ("E", "features[places[:, training].unique()]", "features", "reward golden:ranker"),
        ("own", "np.bincount(bins, chance - preference)", "np.bincount(bins, np.abs(chance - preference))", "reward"),
        ("own", "votes.a] - utility[votes.b]", "votes.b] - utility[votes.a]", "reward"),
    ],
    "world/ears.py": [
        ("own", "sliding_window_view(smooth, 5).argmax(1) == 2", "sliding_window_view(smooth, 5).argmax(1) == 1", "ears"),
        ("own", "(loud[-1] + 1) * FRAME_SECONDS", "loud[-1] * FRAME_SECONDS", "ears golden:taggers"),
        ("own", "not together and a.onset < b.onset - 0.1", "a.onset < b.onset - 0.1", "ears"),
        ("own", "2 * hits / (2 * hits + extras + misses)", "2 * hits / (2 * hits + extras)", "ears"),
        ("own", 'np.searchsorted(ordered, values, "right")', "np.searchsorted(ordered, values)", "reward"),
    ],
    "world/train_ears.py": [
        ("own", "np.minimum(offset, starts + FRAME_SECONDS)", "np.minimum(offset, starts)", "train_ears"),
        ("own", "heard - rate * heard", "heard + rate * heard", "train_ears golden:tagger_training"),
        ("own", "moved(rate, shifts * 2, 0)", "moved(rate, shifts, 0)", "train_ears"),
        ("own", "np.maximum(1, truth.sum(0) + heard.sum(1))", "np.maximum(1, truth.sum(0))", "train_ears"),
    ],
    "world/train_clap.py": [
        ("own", "banned = same & (right[:, None] != right)", "banned = same & (right[:, None] == right)", "train_clap"),
        ("own", "masked_fill(stranger, -2).argmax(0)", "masked_fill(stranger, -2).argmax(1)", "train_clap golden:clap_run"),
        ("own", "scale_text * cosines.T", "scale_text * cosines", "train_clap golden:clap_training"),
    ],
    "world/votes.py": [
        ("own", "(self.tie - gain) / self.noise", "(self.tie + gain) / self.noise", "votes golden:votes"),
        ("own", "other + (other >= first)", "other + (other > first)", "votes golden:votes"),
        ("own", "for_a / (for_a + for_b)", "for_a", "votes golden:votes"),
    ],
    "world/scenes.py": [
        ("own", "superset(pair) for pair in unseen_pairs())", "superset(pair) for pair in unseen_pairs()[1:])", "world"),
        ("own", "(edges[1:] - gaps)", "(edges[1:] + gaps)", "world golden:world_scenes"),
        ("own", 'self.rng(index, "audio"), self.rng(index, "degradation")', 'self.rng(index, "audio"), self.rng(index, "audio")',
         "world golden:world_audio"),
    ],
    "world/sounds.py": [
        ("own", "np.diff(starts, append=n)", "np.diff(starts, prepend=0)", "world"),
        ("own", "peak * 0.06 ** level", "peak * 0.06 * level", "votes golden:degradations"),
    ],
    "world/reader.py": [
        ("own", '"together" if scene.relation == "and"', '"together" if scene.relation != "then"', "train_clap"),
    ],
}


def place_of(old, file, texts):
    """The file that holds a text once: `file`, or the only one of all; "file?" where there is none."""
    if texts.get(file, "").count(old) == 1:
        return file
    holders = [name for name, text in texts.items() if old in text]
    return holders[0] if len(holders) == 1 and texts[holders[0]].count(old) == 1 else f"{file}?"


def node(word):
    """The pytest argument of a word of a row."""
    file, _, name = word.partition(":")
    return f"tests/test_{file}.py" + (f"::test_golden[{name}]" if name else "")


def fork_tests(copy, words):
    """Start the tests of a row in the copy -> pid of the forked process, the leader of its group."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(copy)
    log = os.open("mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    import pytest
    code = 3
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *map(node, words)])
    finally:
        os._exit(int(code))


def outcome(code, late):
    """What a process's end means for its mutant."""
    if late or code == 1:
        return "killed"
    return {0: "SURVIVED", 2: "killed", 4: "NO SUCH TEST", 5: "NO SUCH TEST"}.get(code, f"ENDED WITH {code}")


def run_all(waiting, copies, seconds):
    """Yield (row, what happened, its seconds) of each mutant; one at a time in each copy."""
    free, running = list(copies), {}
    while waiting or running:
        while waiting and free:
            row, copy = waiting.pop(0), free.pop()
            path = copy / row[1]
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(row[2], row[3]), encoding="utf-8")
            running[fork_tests(copy, row[4])] = row, copy, path, whole, time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        late = [each for each, (*_, began) in running.items() if time.monotonic() - began > seconds]
        if not pid and not late:
            time.sleep(0.05)
            continue
        if not pid:
            pid = late[0]
            os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        row, copy, path, whole, began = running.pop(pid)
        path.write_text(whole, encoding="utf-8")
        free.append(copy)
        yield row, outcome(os.waitstatus_to_exitcode(status), pid in late), time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the mutants to run")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in a copy of its own")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one mutant, which then counts as killed")
    parser.add_argument("--unchecked", action="store_true", help="believe that the tests pass without a fault")
    parser.add_argument("--list", action="store_true", help="print the mutants and which of them are stale")
    args = parser.parse_args()
    rows = [(section, file, old, new, ["faults", *sorted(tests.split(), key=lambda word: "golden" not in word)])
            for file, table in MUTANTS.items() for section, old, new, tests in table]
    sections = {row[0] for row in rows}
    rows = [row for row in rows if (args.only == row[0] if args.only in sections else args.only in str(row))]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources().values()}
    rows = [(section, place_of(old, file, texts), old, new, tests) for section, file, old, new, tests in rows]
    stale = [row for row in rows if row[1].endswith("?")]
    for section, file, old, new, tests in rows if args.list else stale:
        print(f"{'STALE ' * file.endswith('?')}{section} {file}: {old.strip()!r} -> {new.strip()!r}  [{' '.join(tests)}]")
    print(f"{len(rows)} mutants, {len(stale)} stale", flush=True)
    if args.list:
        return

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("CI", None)                  # there, absent fixtures would be an error
    sys.dont_write_bytecode = True              # two mutants of one second would share a .pyc
    import scipy.signal, soundfile, torch, transformers.models.clap, transformers.models.t5.modeling_t5  # noqa: E401, F401
    torch.set_num_threads(1)
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        copies = [Path(place, f"place_{i}", "repository") for i in range(args.jobs)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        fresh = [row for row in rows if row not in stale]
        words = set() if args.unchecked else {word for row in fresh for word in row[4]}
        whole = [("no fault", "README.md", "", "", [word]) for word in sorted(words)]
        broken = {row[4][0] for row, what, _ in run_all(whole, copies, 600) if what != "SURVIVED"}
        if broken:
            print(f"fail or are absent without a fault, and left out: {' '.join(sorted(broken))}", flush=True)
        fresh = [(*row[:4], [word for word in row[4] if word not in broken]) for row in fresh]
        fresh = [row for row in fresh if row[4]]
        for row, what, seconds in run_all(fresh, copies, args.seconds):
            found[row[0]].append(what)
            print(f"{what:9} {seconds:4.0f} s  {row[0]} {row[1]}: {row[2].strip()!r} -> {row[3].strip()!r}", flush=True)
    for section, ends in found.items():
        killed = ends.count("killed")
        print(f"{section}: {killed} of {len(ends)} killed ({killed / len(ends):.0%})")


if __name__ == "__main__":
    main()
