"""The one build step: compile protos/**/*.proto to Python modules that lie beside them.

The .proto files name one another as the wire's package does (`wint2/common/v1/common.proto`, the root is
`protos/`), while Python imports them as `protos.wint2.common.v1.common_pb2`. So the sources are compiled to
a descriptor set, their paths in it get the prefix `protos/`, and the stubs are generated from that.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
PACKAGE = ROOT / "protos"


def protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True, cwd=ROOT)


def write_descriptor_set(path: Path, sources: list[str]) -> None:
    """Compiles the sources and renames them, so that imports in the stubs begin with `protos.`."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    include = Path(__import__("grpc_tools").__file__).parent / "_proto"
    protoc(
        f"-I{PACKAGE}", f"-I{include}", "--include_imports", "--include_source_info", f"-o{path}", *sources
    )
    files = FileDescriptorSet.FromString(path.read_bytes())
    for file in files.file:
        if file.name in sources:
            file.name = f"protos/{file.name}"
        for index, dependency in enumerate(file.dependency):
            if dependency in sources:
                file.dependency[index] = f"protos/{dependency}"
    path.write_bytes(files.SerializeToString())


def compile_protos() -> None:
    sources = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.proto"))
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [
        f"--plugin={path}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        for path in [*scripts.glob(name), *(Path(entry) / name for entry in sys.path)]
        if path.is_file()
    ]
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder) / "protos.binpb"
        write_descriptor_set(descriptors, sources)
        protoc(
            f"--descriptor_set_in={descriptors}",
            *plugins,
            "--python_out=.",
            "--grpc_python_out=.",
            "--mypy_out=quiet:.",
            "--mypy_grpc_out=quiet:.",
            *(f"protos/{source}" for source in sources),
        )


class BuildProtos(Command):
    description = "compile protos/**/*.proto"
    user_options: ClassVar[list[tuple[str, str, str | None]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        compile_protos()

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.proto")]


class Build(build):
    sub_commands: ClassVar[list[tuple[str, Any]]] = [("build_protos", None), *build.sub_commands]


setup(cmdclass={"build": Build, "build_protos": BuildProtos})
