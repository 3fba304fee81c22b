"""The harness's model against the harness's own Hugging Face model, and against `evaluate`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.evaluate import commonsense, run, truthfulqa, truthfulqa_files
from svd_engine.evaluate.journal import Journal
from tests.tiny import tiny_peft, two_pass

pytest.importorskip("lm_eval", reason='pip install "svd-engine[eval]"')

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from svd_engine.integrations.lm_eval import SVDEngineLM

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHAT = "{% for m in messages %}w0{{ loop.index }}0 {{ m.content }} {% endfor %}w009"


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft("llama"), words, SteeringConfig(0.0, alpha=0.1))


@pytest.fixture(scope="module")
def theirs(engine):
    return HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=4)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


PAIRS = requests(
    "loglikelihood",
    ("w005 w017 ", "w040"), ("w005 w017", " w033 w101"), ("", "w007 w120"), ("", "w001 w120"),
    ("w003 " * 140, "w005 w006"), ("w001 w005", " w088"),
)  # fmt: skip


def close(ours, theirs):
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_at_strength_0_it_is_the_adapted_model(engine, theirs):
    steered, adapted = SVDEngineLM(engine=engine), SVDEngineLM(engine=engine, model="adapted")
    wanted = theirs.loglikelihood(PAIRS, disable_tqdm=True)
    close(steered.loglikelihood(PAIRS, disable_tqdm=True), wanted)
    close(adapted.loglikelihood(PAIRS, disable_tqdm=True), wanted)
    texts = requests(
        "loglikelihood_rolling",
        ("w005 w017 w090",),
        (" ".join(f"w{7 * i % 211:03}" for i in range(300)),),
    )
    rolled = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert steered.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        rolled, abs=1e-3
    )


def test_the_base_is_the_model_without_its_adapter(engine, theirs):
    ours = SVDEngineLM(engine=engine, model="base").loglikelihood(PAIRS, disable_tqdm=True)
    with engine.model.disable_adapter():
        close(ours, theirs.loglikelihood(PAIRS, disable_tqdm=True))


def test_it_generates_what_theirs_does(engine, theirs):
    asked = requests(
        "generate_until",
        ("w005 w017", {"until": ["w0"], "max_gen_toks": 9}),
        ("w101", {"until": [], "max_gen_toks": 9, "do_sample": False}),
        ("w003 " * 140, {"until": ["w1"], "max_gen_toks": 5, "temperature": 0.0}),
        ("w101 w120", {"max_gen_toks": 12}),
    )
    ours = SVDEngineLM(engine=engine, model="adapted")
    assert ours.generate_until(asked, True) == theirs.generate_until(asked, True)


def test_steered(engine, words):
    ours = SVDEngineLM(engine=engine, strength=-4.0)
    assert engine.steering.ranking.strength == 0.0
    assert "strength=-4.0" in ours.get_model_info()["steering"]
    chosen = [token for token, _ in two_pass(engine.model, [5, 17], 6, -4.0)]
    (text,) = ours.generate_until(
        requests("generate_until", ("w005 w017", {"max_gen_toks": 6})), True
    )
    assert text == words.decode(chosen)
    continuation = " " + words.decode(chosen)
    pairs = requests("loglikelihood", ("w005 w017", continuation), ("w005 w017", " w003"))
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    engine.steering = SteeringConfig(-4.0, alpha=0.1)
    scored = engine.score("w005 w017", [continuation, " w003"])
    engine.steering = SteeringConfig(0.0, alpha=0.1)
    assert [x for x, _ in found] == pytest.approx(scored, abs=1e-4)


def test_draws_depend_on_the_place(engine):
    ours = SVDEngineLM(engine=engine, strength=-4.0)
    same = ("w005 w017", {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0})
    first, second = ours.generate_until(requests("generate_until", same, same), True)
    assert first != second
    assert ours.generate_until(requests("generate_until", same, same), True) == [first, second]


def test_chat(engine, words, monkeypatch):
    monkeypatch.setattr(words, "chat_template", CHAT)
    ours = SVDEngineLM(engine=engine)
    history = [{"role": "user", "content": "w005"}]
    assert ours.apply_chat_template(history) == "w010 w005 w009"
    assert ours.chat_template(True) == CHAT


def test_what_is_refused(engine, tiny_folder):
    for arguments, message in (
        ({}, "give adapter="),
        ({"engine": engine, "model": "merged"}, "model must be one of steered, adapted, base"),
        ({"engine": engine, "model": "base", "strength": 1.0}, "model='base' is not steered"),
        ({"engine": engine, "max_length": 1000}, "max_length must be an integer from 2 to 128"),
        ({"engine": engine, "batch_size": 0}, "batch_size: give auto or an integer"),
        ({"engine": engine, "batch_size": "many"}, "batch_size: "),
        (
            {"adapter": tiny_folder / "adapter", "base": tiny_folder / "base"},
            "no steering_config.json: run svd-engine calibrate, or give strength=",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SVDEngineLM(**arguments)
    ours = SVDEngineLM(engine=engine, batch_size="auto:4", max_batch_size=3)
    assert ours.batch_size == 3
    for options, message in (
        ({"max_gen_toks": 200}, "max_gen_toks must be below max_length = 128"),
        ({"max_gen_toks": 3, "colour": 3}, "gen_kwargs: unexpected keyword argument 'colour'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(requests("generate_until", ("w005", options)), True)
    with pytest.raises(ValueError, match="a continuation has 140 tokens; max_length is 128"):
        ours.loglikelihood(requests("loglikelihood", ("w005", " w006" * 140)), True)


def task(path, prompt):
    """A multiple-choice task of the harness, from a local file of prompts and choices."""
    return dict(
        task=path.stem, dataset_path="json", output_type="multiple_choice", num_fewshot=0,
        dataset_kwargs={"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")},
        test_split="test", doc_to_text=prompt, doc_to_choice="choices", doc_to_target=0,
        target_delimiter="", metric_list=[{"metric": "acc"}],
    )  # fmt: skip


def asked_by_the_harness(model, path, items, template):
    """log P of every answer to every item, and the accuracy, by the harness."""
    lines = [
        {"text": template.format(question=item.question), "choices": item.answers} for item in items
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = simple_evaluate(
        model=model,
        tasks=[task(path, "text")],
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    samples = sorted(results["samples"][path.stem], key=lambda sample: sample["doc_id"])
    scores = [[float(resp[0][0]) for resp in sample["resps"]] for sample in samples]
    return scores, results["results"][path.stem]["acc,none"]


def compare(engine, items, template, folder):
    """The harness on ours and on theirs, and `evaluate`: log-likelihoods of the same answers."""
    own = run.by_likelihood(engine, items, template, Journal(folder / "own.jsonl", {}, False), 4)
    theirs = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=4)
    zero, hf, steered = (
        asked_by_the_harness(model, folder / f"{name}.json", items, template)
        for name, model in (
            ("zero", SVDEngineLM(engine=engine, strength=0.0)), ("hf", theirs),
            ("steered", SVDEngineLM(engine=engine)),
        )
    )  # fmt: skip
    assert zero[1] == hf[1]
    for ours, expected in ((zero, hf[0]), (zero, own["adapted"]), (steered, own["steered"])):
        for row, wanted in zip(ours[0], expected, strict=True):
            if template.endswith("\n"):  # the harness scores the prompt's last white space as well
                row, wanted = ([x - each[0] for x in each] for each in (row, wanted))
            assert row == pytest.approx(wanted, abs=1e-3)
    right = [all(row[0] > x for x in row[1:]) for row in own["steered"]]
    assert steered[1] == pytest.approx(sum(right) / len(right))


def test_the_harness_and_evaluate_agree(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "steering", SteeringConfig(-3.0, alpha=0.1))
    questions = [
        truthfulqa.Question("", f"w{i:03} w{i + 7:03}?", ["w009", "w010 w011"], ["w012"], ["w012"])
        for i in range(20, 26)
    ]
    compare(engine, questions, truthfulqa.PLAIN, tmp_path)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not there")
@pytest.mark.parametrize("questions", ["truthfulqa", "arc-easy"])
def test_the_harness_and_evaluate_agree_on_smollm2(smollm2, questions, tmp_path):
    model, tokenizer = smollm2
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    try:
        engine = SteeredEngine(peft_model, tokenizer, SteeringConfig(-5.0))
        if questions == "truthfulqa":
            items = truthfulqa.test(truthfulqa_files.read(SHARED / "truthfulqa" / "mc_task.json"))
            compare(engine, items[:3], truthfulqa.PLAIN, tmp_path)
        else:
            items = commonsense.read(commonsense.find(SHARED / "commonsense", questions, "test"))
            compare(engine, items[:3], commonsense.TEMPLATE, tmp_path)
    finally:
        peft_model.unload()


def test_the_command(run, tiny_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: asked.append(sys.argv))
    arguments = ["run", "--model", "svd-engine", "--tasks", "arc_easy", "--help"]
    assert run("lm-eval", *arguments) == (0, "", "")
    assert asked == [["lm-eval", *arguments]]
    assert get_model("svd-engine") is SVDEngineLM and get_model("hf") is HFLM
    made = SVDEngineLM.create_from_arg_string(
        f"adapter={tiny_folder / 'adapter'},base={tiny_folder / 'base'},strength=-4",
        {"device": None if torch.cuda.is_available() else "cuda:0", "batch_size": "auto"},
    )
    assert made.steering.ranking == SteeringConfig(-4) and made.device == made.engine.model.device


def test_the_command_without_the_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("lm-eval", "run")
    assert code == 2 and 'pip install "svd-engine[eval]"' in err
