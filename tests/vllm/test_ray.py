"""`ray.data.llm` with the plugin's engine arguments; its actor is killed midway."""

import pytest

from svd_engine.integrations.vllm import engine_args
from tests.tiny import assert_same_tokens
from tests.vllm.conftest import SETTINGS
from tests.vllm.test_engine import REQUESTS, TIE, truth
from tests.vllm.test_processes import ENVIRONMENT

ray = pytest.importorskip("ray")
llm = pytest.importorskip("ray.data.llm")
ROWS, CHECKED, NEW = 1000, 40, 6


def test_ray_data(vllm, ray_cluster, folder_of, tmp_path):
    """Rows with strengths and models of their own come once each, with the tokens of plain PEFT."""
    import psutil

    root, model = folder_of("llama")
    arguments = engine_args(root / "base", root / "adapter", **SETTINGS)
    off = {"enabled": False}
    config = llm.vLLMEngineProcessorConfig(
        model_source=arguments.pop("model"), engine_kwargs=arguments, batch_size=20, concurrency=1,
        placement_group_config={"bundles": [{"CPU": 1}]}, log_engine_metrics=False,
        runtime_env={"env_vars": ENVIRONMENT}, chat_template_stage=off, tokenize_stage=off,
        detokenize_stage=off,
    )  # fmt: skip
    died, requests = tmp_path / "died", REQUESTS

    def before(row):
        extra = {k: v for k, v in requests[row["row"] % len(requests)].items()}
        params = dict(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        params |= {"extra_args": extra} if extra else {}
        return {**row, "tokenized_prompt": row["ids"], "sampling_params": params}

    def after(row):
        if row["row"] >= ROWS // 4 and not died.exists():
            died.touch()
            for process in psutil.Process().parent().children():  # the workers of this node
                if "vLLMEngineStage" in " ".join(process.cmdline()):
                    process.kill()
        return {"row": row["row"], "tokens": list(row["generated_tokens"])}

    prompts = [[3 + (i * 7 + j * 13) % 200 for j in range(1 + i % 9)] for i in range(ROWS)]
    items = [{"row": i, "ids": prompt} for i, prompt in enumerate(prompts)]
    processor = llm.build_processor(config, preprocess=before, postprocess=after)
    done = processor(ray.data.from_items(items, override_num_blocks=ROWS // 20)).take_all()
    got = sorted(done, key=lambda row: row["row"])
    assert died.exists()
    assert [row["row"] for row in got] == list(range(ROWS))
    for row in got[:: ROWS // CHECKED]:
        i, tokens = row["row"], list(row["tokens"])
        assert len(tokens) == NEW
        expected = truth(model, prompts[i], tokens, requests[i % len(requests)])
        assert_same_tokens(tokens, expected, TIE)
