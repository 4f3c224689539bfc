"""Package PillSnap. Everything is read from `settings.ini`; a wheel also carries the stage notebooks and the
presets."""

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
EXTRAS = ("train", "lab", "serve", "openvino", "faiss", "sign", "cluster", "dev")


class BuildWithResources(build_py):
    "Copy notebooks and presets into the wheel, where `pillsnap.core.config` looks for them."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # a checkout reads nbs/ and configs/ themselves
        for folder, pattern in (("nbs", "*/[0-9]*.ipynb"), ("configs", "*.yaml")):
            out = Path(self.build_lib) / "pillsnap" / "_resources" / folder
            out.mkdir(parents=True, exist_ok=True)
            for p in sorted((here / folder).glob(pattern)):
                copy = out / p.relative_to(here / folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy2(p, copy)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']},<3.13",
    packages=find_packages(include=["pillsnap", "pillsnap.*"]),
    package_data={"pillsnap": ["assets/*", "web/*"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in EXTRAS},
    zip_safe=False,
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
    cmdclass={"build_py": BuildWithResources},
)
