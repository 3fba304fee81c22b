"""A hook of mkdocs: the figures beside the results become pages' images, without a copy of them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in Path(config.config_file_path).parent.glob(f"{RESULTS}/*.svg"):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(f"](../{RESULTS}/", "](images/")
