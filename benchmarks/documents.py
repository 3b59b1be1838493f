"""Long English documents that every Debian machine can get: manuals in packages, made plain text.

    python benchmarks/documents.py [--work-dir build/documents]

Each becomes a text file in the work folder; those that are there are not fetched again. Without apt-get, copy the
folder from a machine that has it. Last line: one JSON object with the size and the digest of every text.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from mlx_resonance.errors import UsageError
from mlx_resonance.storage import atomic_file

from reporting import exit_with, markdown

FOLDER = Path("build") / "documents"
PERL = "perl-regex"  # of SOURCES: a tutorial, mostly prose
# By name of the document: its package, and the beginning of it in the package. A book's index.html names its pages.
SOURCES = {
    PERL: ("perl-doc", "usr/share/perl/*/pod/perlretut.pod"),
    "perl-operators": ("perl-doc", "usr/share/perl/*/pod/perlop.pod"),
    "debian-reference": ("debian-reference-en", "usr/share/debian-reference/index.en.html"),
    "git-manual": ("git-doc", "usr/share/doc/git-doc/user-manual.html"),
    "debian-handbook": ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/index.html"),
}
NAVIGATION = {"navheader", "navfooter", "docnav", "toc"}  # classes
HIDDEN = {"head", "script", "style"}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}  # tags that nothing closes
BLOCKS = {
    "blockquote", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p", "pre", "table", "tr",
    "ul",
}  # fmt: skip


class Document(NamedTuple):
    """A long text; its name is one of `SOURCES`."""

    name: str
    text: str


def documents(work_dir: Path) -> list[Document]:
    """The texts of `SOURCES`, in its order; those that the folder lacks are fetched first.

    Raises:
        UsageError: there is no apt-get, or it cannot get a package.
    """
    for package in dict.fromkeys(package for package, _ in SOURCES.values()):
        missing = [
            name for name, (of, _) in SOURCES.items() if of == package and not (work_dir / f"{name}.txt").exists()
        ]
        if missing:
            fetch(package, missing, work_dir)
    return [Document(name, (work_dir / f"{name}.txt").read_text(encoding="utf-8")) for name in SOURCES]


def digest_of(text: str) -> str:
    """A hash of a text, for the settings of a run log: texts change with the Debian release."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(package: str, names: list[str], work_dir: Path) -> None:
    """Download a package and write the texts of some of its documents."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            wanted = f"copy {work_dir} from a Debian machine on which this has run"
            raise UsageError(
                f"the text {names[0]} comes from Debian's package {package}, and there is no {program}: {wanted}"
            )
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = Path(name)
        run("apt-get", "download", package, folder=folder, remedy="apt-get update may be needed")
        run("dpkg", "-x", next(folder.glob("*.deb")).name, ".", folder=folder, remedy="the download may be damaged")
        for document in names:
            start = next(folder.glob(SOURCES[document][1]), None)
            if start is None:
                raise UsageError(f"the package {package} of this Debian release has no {SOURCES[document][1]}")
            with atomic_file(work_dir / f"{document}.txt") as partial:
                partial.write_text(read(start), encoding="utf-8")


def run(*command: str, folder: Path, remedy: str) -> None:
    """Run a command. Raises UsageError with its last line."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UsageError(f"{' '.join(command)} fails: {last} ({remedy})")


def read(start: Path) -> str:
    """The text of a pod file, of a page, or of all pages of a book that its index names, in that order."""
    source = start.read_text(encoding="utf-8", errors="replace")
    if start.suffix == ".pod":
        return pod_text(source)
    if not start.name.startswith("index."):
        return html_text(source)
    links = dict.fromkeys(re.findall(r'href="([\w.-]+\.html)[#"]', source))
    pages = [start.parent / link for link in links if link != start.name]
    return "\n\n".join(html_text(page.read_text(encoding="utf-8", errors="replace")) for page in pages)


def pod_text(source: str) -> str:
    """The text of Perl's documentation format: headings, items, paragraphs and code, without formatting codes."""
    paragraphs, other = [], False  # between =begin and =end: another format
    for paragraph in re.split(r"\n\s*\n", source[source.find("=") :]):
        command, _, text = paragraph.strip("\n").partition(" ")
        if not command.startswith("="):
            text = paragraph.strip("\n")
        if command in ("=begin", "=end"):
            other = command == "=begin"
        elif other or command.split("\n")[0] in ("=over", "=back", "=for", "=encoding", "=cut", "=pod"):
            continue
        elif paragraph.lstrip("\n").startswith((" ", "\t")):
            paragraphs.append(paragraph.strip("\n"))
        else:
            paragraphs.append(" ".join(without_codes(text).split()))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def without_codes(text: str) -> str:
    """A paragraph of pod without codes such as B<bold>, C<< $a <=> $b >>, E<gt>, L<text|link>."""
    open_codes: list[tuple[str, str, list[str]]] = [("", "", [])]  # letter, what closes it, content
    for token in re.split(r"([A-Z]<<+\s+|[A-Z]<|\s+>>+|>)", text):
        _, closing, content = open_codes[-1]
        if opening := re.fullmatch(r"([A-Z])(<+)\s*", token):
            open_codes.append((opening[1], ">" * len(opening[2]), []))
        elif closing and token.strip() == closing:
            letter, _, _ = open_codes.pop()
            open_codes[-1][2].append(plain(letter, "".join(content)))
        else:
            content.append(token)
    return "".join("".join(content) for _, _, content in open_codes)


def plain(letter: str, content: str) -> str:
    """What a reader sees of a formatting code."""
    if letter == "E":
        return html.unescape(f"&{content};")
    if letter in "XZ":  # an entry of the index, nothing
        return ""
    return content.split("|")[0].lstrip("/") if letter == "L" else content


class Page(HTMLParser):
    """Collects the paragraphs of a page, without navigation; those of code keep their spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._line, self._hidden, self._code = "", 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a paragraph, or leave out everything until the tag is closed."""
        classes = (dict(attrs).get("class") or "").split()
        if tag in VOID:
            return
        if self._hidden or tag in HIDDEN or NAVIGATION.intersection(classes):
            self._hidden += 1
        elif tag in BLOCKS:
            self.end()
            self._code = tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing: <a/> has no text."""

    def handle_endtag(self, tag: str) -> None:
        """End a paragraph."""
        if self._hidden and tag not in VOID:
            self._hidden -= 1
        elif tag in BLOCKS:
            self.end()
            self._code = False
        elif tag in ("td", "th"):
            self._line += " "

    def handle_data(self, data: str) -> None:
        """Add to the paragraph."""
        if not self._hidden:
            self._line += data

    def end(self) -> None:
        """Keep the paragraph, if it has text."""
        text = self._line.strip("\n") if self._code else " ".join(self._line.split())
        if text.strip():
            self.paragraphs.append(text)
        self._line = ""


def html_text(source: str) -> str:
    """The text of a page of HTML."""
    page = Page()
    page.feed(source)
    page.close()
    page.end()
    return "\n\n".join(page.paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where the texts are kept")
    found = documents(parser.parse_args().work_dir)
    rows = [(name, SOURCES[name][0], f"{len(text):,}", digest_of(text)) for name, text in found]
    print(markdown(("document", "package", "characters", "digest"), rows))
    print(json.dumps({name: {"characters": len(text), "digest": digest_of(text)} for name, text in found}))


if __name__ == "__main__":
    exit_with(main)
