"""Hooks of mkdocs.yml: what the site has beyond docs/, which is files that its pages link to and the help of `specattn`."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parent.parent
# Folders that pages link to -> what stands for them in the site.
FOLDERS = {"benchmarks/results": "benchmarks.md", "model_cards/examples": "model_cards/examples/svd/README.md"}
OUTSIDE = re.compile(r"\]\(\.\./((?!\.\.)[^)#]+)")


def on_files(files, config):
    """Add the linked files, each under its path in the checkout, and CONTRIBUTING.md as a page."""
    linked = {"CONTRIBUTING.md"}
    for page in files.documentation_pages():
        linked |= {FOLDERS.get(path, path) for path in OUTSIDE.findall(page.content_string)}
    linked |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "benchmarks/results").glob("*.md")}
    linked |= {path.replace("README.md", "kappa.png") for path in linked if path.startswith("model_cards/")}
    for path in sorted(linked):
        if files.get_file_from_path(path) is None:
            name = "contributing.md" if path == "CONTRIBUTING.md" else path
            files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / path)))
    files.append(File.generated(config, "command_line.md", content=command_line()))
    return files


def command_line():
    """The help of every command, as typer writes it; without the last, which is hidden."""
    command = [sys.executable, "-m", "typer", "specattn", "utils", "docs", "--name", "specattn"]
    done = subprocess.run([*command, "--title", "The command line"], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    text = done.stdout.partition("## `specattn report-training`")[0]
    return re.sub(r"^\* `report-training`.*\n", "", text, flags=re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    """Point links out of docs/ to the files that `on_files` added, and links of CONTRIBUTING.md into docs/."""
    if page.file.src_uri == "contributing.md":
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        return re.sub(r"\]\(benchmarks/results\)", "](benchmarks.md)", markdown)
    return OUTSIDE.sub(lambda found: f"]({FOLDERS.get(found[1], found[1])}", markdown)


def on_page_content(html, page, config, files):
    """Docstrings name other objects as [`name`]; no link stands behind the brackets."""
    return re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
