"""How the files beside this one were written, by the code of commit 3aa9344; documentation, as make_golden.py is.

    python PATH/make_fixtures.py OLD            # OLD: a checkout of 3aa9344

A working folder has golden/ (what comes to lie beside this file), and links to the checkout's checkpoints/ and
sounds/; all command lines (commands.json) are meant to run in such a folder. Runs are stopped by an exception right
after state.pt of a step was written, as a kill would, or by --max_minutes 0. What can be made again is left out:
exported weights, the manifest's latents, rendered scenes.
"""
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import make_golden
from make_golden import HERE

# as small as they come: all that is here together has 1.5 MB
FLOW_CONFIG = dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=6, num_attention_heads=1,
                   joint_attention_dim=8, audio_seq_len=64, max_duration=4.096, axes_dims_rope=[2, 2, 2])
CODEC_CONFIG = dict(data_dim=80, embed_dim=4, hidden_dim=4, ch_mult=[1, 1, 1], num_res_blocks=1, attn_layers=[],
                    down_layers=[0, 1])

FLOW = ("--checkpoint golden/model --cache golden/latents/world --scenes 6 --val_scenes 3 --val_clips 3 --workers 0 "
        "--batch_size 3 --steps 8 --learning_rate 1e-3 --dropout 0.2 --save_every 4 --val_every 4 --log_every 1 "
        "--dtype float32 --device cpu")
EARS = "checkpoints/toy/base/clap_reward"
COMMANDS = {
    "run_flow_adamw": f"python train_fm.py {FLOW} --train_text --out golden/run_flow/adamw",
    "run_flow_muon": f"python train_fm.py {FLOW} --muon 10 --sigma_rel 0.1 --out golden/run_flow/muon",
    "run_vae": "python vae.py --codec mel --config golden/vae_config.json --clips 2 --validation_clips 1 --batch_size 2 "
               "--warmup_steps 2 --log_every 2 --save_every 4 --steps 8 --crop_seconds 0.256 --learning_rate 1e-3 "
               "--dtype float32 --device cpu --out golden/run_vae",
    "run_crpo": f"python crpo.py --checkpoint golden/model --reward {EARS} --judge checkpoints/toy/base/clap_judge "
                "--tagger checkpoints/toy/base --iterations 1 --prompts 6 --num_samples 3 --pool 20 --evaluate 2 --steps "
                "2 --batch_size 4 --micro_batch 2 --epochs 4 --learning_rate 1e-3 --log_every 1 --save_every 2 "
                "--save_clips 4 --dtype float32 --device cpu --out golden/run_crpo",
    "run_experts": "python expert_iteration.py --checkpoint golden/score --data golden/manifest.jsonl --cache "
                   f"golden/latents/manifest --ranker golden/ranker --clap {EARS} --samples 8 --keep 3 --pool 20 --steps 2 "
                   "--tuning_steps 6 --learning_rate 1e-3 --polish_steps 4 --polish_rate 5e-4 --save_every 2 "
                   "--save_clips 4 --batch_size 4 --dtype float32 --device cpu --out golden/run_experts",
    "run_tagger": "python train_tagger.py --scenes 8 --val_scenes 4 --workers 1 --width 12 --layers 1 --steps 4 "
                  "--batch_size 4 --dtype float32 --device cpu --out golden/run_tagger",
}


class Killed(BaseException):
    """In the place of SIGKILL."""


def start(command, step=None, place=None, module=None):
    """Run a command line in this process; with `step`, until state.pt of that step is written (by `module`)."""
    words = command.split()
    script, before = importlib.import_module(words[1].removesuffix(".py")), sys.argv
    where = importlib.import_module(module) if module else script
    real = where.save_state if hasattr(where, "save_state") else None

    def save_state(out, named, optimizer, average, done, *rest):
        real(out, named, optimizer, average, done, *rest)
        if done == step:
            raise Killed
    sys.argv = words[1:]
    if step:
        where.save_state = save_state
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            script.main()
    except Killed:
        return
    finally:
        sys.argv = before
        if real:
            where.save_state = real
    assert not step, f"{command} ended before step {step}"


def write_inputs():
    """model/, score/, manifest.jsonl, ranker/, vae_config.json, tagger.safetensors."""
    import torch

    import ranker
    import votes
    from common import read_jsonl, write_json, write_jsonl
    from model import TangoFlux, save_model, with_score_head
    from tagger import Tagger, save_tagger
    from text import make_text_encoder
    from vae import make_codec
    from vocoder import MEL_16K, LogMel
    from world import COUNTABLE, EVENT_NAMES, World
    torch.manual_seed(0)
    flow = TangoFlux(FLOW_CONFIG)
    with torch.no_grad():                                              # away from the zeros of the initialisation
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoder = make_text_encoder(["rain", "wind", "a", "violin"], width=8, layers=1, heads=1, d_ff=8)
    codec = make_codec("mel", CODEC_CONFIG).eval()
    save_model("golden/model", flow, codec, encoder)
    scored, _ = with_score_head(flow, "v1", "zero", 0.2, 1.5, seed=0)
    with torch.no_grad():
        for name, parameter in scored.named_parameters():
            if "score_embed" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model("golden/score", scored, references={"vae": "../model", "text_encoder": "../model"})
    rows = read_jsonl("sounds/captions.jsonl")[::9][:8]
    write_jsonl("golden/manifest.jsonl", [{"audio": f"../sounds/{row['audio']}", "caption": row["caption"],
                                           "score": round(0.5 * i - 1.7, 2)} for i, row in enumerate(rows)])
    write_json("golden/vae_config.json", {**CODEC_CONFIG, "attn_layers": [1], "patch": 1,
                                          "linear_skip": False})
    # a ranker that hears with the bundled CLAP and tagger, from 200 votes on two takes of 10 scenes
    log_mel, clips, audios = LogMel(**MEL_16K), [], []
    for index in range(10):
        audio, truth = votes.takes_of(World("train", seed=5000), index, 2, 0.0, log_mel)
        clips += [{**row, "audio": f"{row['scene']}_{row['take']}.wav"} for row in truth]
        audios += [torch.from_numpy(one)[None] for one in audio]
    cast = votes.cast_votes(clips, 200, 0)
    places = {row["audio"]: i for i, row in enumerate(clips)}
    named = {"a": np.array([places[v["a"]] for v in cast]), "b": np.array([places[v["b"]] for v in cast]),
             "preference": np.array([v["preference"] for v in cast], np.float32)}
    parts = [np.arange(0, 120), np.arange(120, 160), np.arange(160, 200)]
    encoders = ranker.Encoders(EARS, "checkpoints/toy/base")
    features = encoders.features(audios, 16000, [row["caption"] for row in clips])
    network, _ = ranker.fit(features, named, parts, (16, 8), epochs=2, batch_size=64)
    ranker.save_ranker("golden/ranker", network, encoders.names, encoders.key())
    torch.manual_seed(0)
    save_tagger("golden/tagger.safetensors", Tagger(EVENT_NAMES, COUNTABLE, 12, 1))


def main():
    old = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(old))
    make_golden.OLD = old
    import torch
    torch.set_num_threads(1)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("checkpoints", "sounds"):
            Path(name).symlink_to(old / name)
        write_inputs()
        Path("golden/commands.json").write_text(json.dumps(COMMANDS, indent=1) + "\n")
        start(COMMANDS["run_flow_adamw"], 4)
        start(COMMANDS["run_flow_muon"], 4)
        start(COMMANDS["run_vae"], 4)
        start(COMMANDS["run_crpo"], 2)
        start(COMMANDS["run_experts"], 2, module="train_fm")
        words = COMMANDS["run_tagger"].split()                         # spawns its workers: a process of its own
        subprocess.run([sys.executable, str(old / words[1]), *words[2:], "--max_minutes", "0"], check=True,
                       capture_output=True)
        keep(Path("golden"))
        os.chdir(before)
        for path in HERE.iterdir():
            if path.name not in ("make_golden.py", "make_fixtures.py", "golden.json", "golden.safetensors"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(Path(folder) / "golden", HERE, dirs_exist_ok=True)


def keep(folder):
    """Drop what a resume does not need."""
    for pattern in ("latents/manifest", "run_flow/*/text_encoder", "run_flow/*/vae.safetensors",
                    "run_experts/round_1/tuned/text_encoder", "run_experts/round_1/tuned/vae.safetensors",
                    "run_experts/round_1/tuned/*.png",
                    "run_tagger/*.safetensors", "run_crpo/listen", "run_vae/*.png", "run_flow/*/averages"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
