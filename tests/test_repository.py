"""Project files are consistent: versions, extras, Makefile targets, tools and copied paths."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


def jobs(path):
    """Yield the jobs of a workflow with their matrices."""
    for job in load_yaml(path)["jobs"].values():
        yield job, job.get("strategy", {}).get("matrix", {})


def commands(path):
    """Yield the commands of a workflow, one per matrix value."""
    for job, matrix in jobs(path):
        for command in (step["run"] for step in job["steps"] if "run" in step):
            name = re.search(r"\$\{\{ matrix\.(\w+) \}\}", command)
            yield from [command] if name is None else [command.replace(name[0], value) for value in matrix[name[1]]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_makefile_targets(path):
    called = [re.fullmatch(r"(?:sudo )?make ([a-z-]+)", command) for command in commands(path)]
    assert called and all(called)
    assert {match[1] for match in called} <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_time_limits_and_read_only_permissions(path):
    assert load_yaml(path)["permissions"] == {"contents": "read"}
    for job, _ in jobs(path):
        assert job["timeout-minutes"] <= 90
        assert all("@v" in step["uses"] for step in job["steps"] if "uses" in step)


def test_ci_runs_all_checks_on_linux_and_macos():
    path = ".github/workflows/ci.yml"
    assert {f"make {verb}" for verb in ("lint", "types", "test", "docs", "wheel")} <= set(commands(path))
    matrix = load_yaml(path)["jobs"]["test"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


def test_ci_installs_debian_packages_before_the_tests_on_linux():
    steps = load_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    position = next(number for number, step in enumerate(steps) if step.get("run") == "sudo make packages")
    assert steps[position]["if"] == "runner.os == 'Linux'"
    assert steps[position + 1]["run"] == "make test"


def test_tested_python_versions_match_the_project():
    tested = load_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    declared = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(f"{prefix}3.")]
    assert tested == declared
    assert PROJECT["requires-python"] == f">={tested[0]}"
    (docker,) = re.findall(r"^ARG PYTHON=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert docker in tested


def test_help_of_benchmarks_keeps_the_lines_of_the_docstring():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for call in re.findall(r"ArgumentParser\(description=__doc__.*", path.read_text()):
            assert "formatter_class=argparse.RawDescriptionHelpFormatter" in call, path.name


def test_versions_are_identical():
    version = PROJECT["version"]
    assert load_yaml("CITATION.cff")["version"] == version
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version


def test_citation_contains_the_software_and_the_paper():
    citation = load_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"].startswith(f"{PROJECT['name']}:") and citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2510.24037" and paper["url"].endswith("/2510.24037")
    assert [author["family-names"] for author in paper["authors"]] == ["Shen", "Sun", "Wang", "Huang"]


def test_hooks_run_the_tools_of_the_makefile():
    for repo in load_yaml(".pre-commit-config.yaml")["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            tool, *args = hook["entry"].split()
            called = [Path(tool).name, *(arg for arg in args if not arg.startswith("-"))]
            assert hook["language"] == "system" and tool.startswith(".venv/bin/")
            assert f"$(BIN)/{' '.join(called)}" in MAKEFILE


def test_extras_in_documents_exist():
    patterns = ("src/**/*.py", "docs/**/*.md", "examples/*.*", "examples/**/*.toml", "experiments/**/*.yaml", "*.md")
    patterns += ("Makefile", "Dockerfile")
    named = {}
    for path in {path for pattern in patterns for path in ROOT.glob(pattern)}:
        for match in re.finditer(r"(?:snella|'\.)\[([a-z0-9,-]+)\]", path.read_text(encoding="utf-8")):
            named.update(dict.fromkeys(match[1].split(","), path.name))
    assert {"app", "lab", "fast", "dev"} <= set(named)
    assert {name: file for name, file in named.items() if name not in EXTRAS} == {}


def test_extras_refer_to_existing_extras():
    inner = [line.partition("[")[2].rstrip("]") for lines in EXTRAS.values() for line in lines if "snella[" in line]
    assert inner and {name for names in inner for name in names.split(",")} <= set(EXTRAS)


def test_docker_image_installs_existing_extras_from_copied_files():
    dockerfile = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", dockerfile, re.MULTILINE)
    assert set(extras.split(",")) <= set(EXTRAS)
    copied = " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE)).split()
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(sent) and all((ROOT / name).exists() for name in copied)
    assert not [name for name in re.findall(r'"([\w-]+==[\d.]+)"', dockerfile) if f"'{name}'" not in MAKEFILE]


def test_docker_image_contains_all_build_files():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = [*build["packages"], *build["force-include"], PROJECT["readme"]]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert not [name for name in sources if not any(fnmatch.fnmatch(name, f"{part}*") for part in sent)]


def test_all_packages_are_typed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert [name for name in packages if not (ROOT / "src" / name / "py.typed").is_file()] == []


def test_benchmark_scripts_have_an_argument_parser():
    scripts = {path: path.read_text() for path in (ROOT / "benchmarks").rglob("*.py")}
    scripts = {path: text for path, text in scripts.items() if 'if __name__ == "__main__":' in text}
    assert len(scripts) > 30
    without_help = [
        path.name for path, text in scripts.items() if not re.search(r"parse_args\(|parser\(\)|common\.main\(", text)
    ]
    assert not without_help
