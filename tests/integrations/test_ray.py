"""The recipe of docs/scaling.md for Ray Data: an engine per actor, of which one is killed."""

import os
import signal

import pytest

from svd_engine import SteeredEngine, SteeringConfig

ray = pytest.importorskip("ray")
ROWS = 1000


@pytest.mark.slow
def test_actors(ray_cluster, tiny_folder, tmp_path):
    """Every row comes once, with the tokens of a call without Ray: seeds are the rows' own."""
    folders = str(tiny_folder / "base"), str(tiny_folder / "adapter")
    options = dict(temperature=1.3, max_new_tokens=6, steering=SteeringConfig(-3.0, alpha=0.01))
    died = tmp_path / "died"

    class Steered:
        def __init__(self, *folders):
            self.engine = SteeredEngine.from_pretrained(*folders)

        def __call__(self, batch):
            rows = batch["row"].tolist()
            if ROWS // 2 in rows and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            found = self.engine.generate(list(batch["prompt"]), seed=rows, **options)
            return {"row": batch["row"], "text": [completion.text for completion in found]}

    prompts = [f"w{3 + i % 90:03} w{5 + i * 7 % 90:03}" for i in range(ROWS)]
    items = [{"row": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    done = ray.data.from_items(items, override_num_blocks=40).map_batches(
        Steered, fn_constructor_args=folders, batch_size=20, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )  # fmt: skip
    got = sorted(done.take_all(), key=lambda row: row["row"])
    assert died.exists()
    assert [row["row"] for row in got] == list(range(ROWS))
    engine = SteeredEngine.from_pretrained(*folders)
    want = engine.generate(prompts, seed=list(range(ROWS)), **options)
    assert [row["text"] for row in got] == [completion.text for completion in want]
    assert len({completion.text for completion in want}) > ROWS // 2
