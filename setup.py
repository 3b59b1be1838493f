"""Which folders are installed: every package under mlx_resonance/, and convert/ as mlx_resonance.convert; the links."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RELEASE = runpy.run_path(str(ROOT / "mlx_resonance" / "release.py"))


def project_urls(repository: str | None) -> dict[str, str]:
    """The project's pages by the names that an index shows; empty until the address is known."""
    if repository is None:
        return {}
    pages = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
    return {"Repository": repository} | {name: f"{repository}/{path}" for name, path in pages.items()}


def absolute_links(text: str, repository: str | None, ref: str) -> str:
    """Make a page's relative links absolute, at one commit; until the address is known, return it unchanged."""
    if repository is None:
        return text

    def absolute(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        kind = "raw" if image else "tree" if target.endswith("/") else "blob"
        return f"{image}[{label}]({repository}/{kind}/{ref}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


# Everything else is in pyproject.toml, which can give a package another folder (package-dir), but cannot combine a
# search for packages with a name of ours, nor leave out links.
setup(
    packages=[
        *find_packages(include=["mlx_resonance", "mlx_resonance.*"]),
        "mlx_resonance.convert",
        *(f"mlx_resonance.convert.{name}" for name in find_packages("convert")),
    ],
    project_urls=project_urls(RELEASE["REPOSITORY"]),
    long_description=absolute_links(
        (ROOT / "README.md").read_text(encoding="utf-8"), RELEASE["REPOSITORY"], f"v{RELEASE['VERSION']}"
    ),
    long_description_content_type="text/markdown",
)
