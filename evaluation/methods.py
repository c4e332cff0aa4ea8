"""The methods that --pred_path names, on the command line or in a YAML file (docs/benchmarks.md)."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evaluation.benchmarks import YAML_SUFFIXES, TextLoader
from evaluation.results import THIS_RUN, About
from unext import files
from unext.errors import InputError
from unext.pairing import MaskNames

KEYS = ("folder", "name", "cite", "year", "venue", "prefix", "suffix")  # of a method in the file


class Training(NamedTuple):
    """The maps of a training of a method; most methods have one."""

    folder: Path
    names: MaskNames  # of the maps
    about: About


def find(texts: Sequence[str], names: MaskNames) -> dict[str, Training]:
    """The trainings that --pred_path names, in order; `names`: prefix and suffix of maps, unless the file gives others.

    Each text is NAME=DIR or DIR, or the only one is a YAML file. The same NAME twice is two trainings of a method.
    """
    if is_file(texts):
        return from_file(Path(texts[0]), names)
    trainings: dict[str, Training] = {}
    unnamed: set[str] = set()
    for text in texts:
        name, folder = name_and_folder(text)
        if not name:
            name = THIS_RUN if len(texts) == 1 else base_name(folder)
            unnamed.add(name)
        if name in trainings and name in unnamed:
            raise InputError(f"--pred_path: two methods are called {name}; name them, as in ours={folder}")
        trainings[free_key(name, trainings)] = Training(Path(folder), names, About(name))
    return trainings


def name_and_folder(text: str) -> tuple[str, str]:
    """The parts of NAME=DIR; of DIR, which may contain "=", the name is empty."""
    name, equals, folder = text.partition("=")
    return (files.printable(name), folder) if equals and not Path(text).is_dir() else ("", text)


def base_name(folder: str) -> str:
    """The name of a folder, also of "." and "..", or of a link to one."""
    return files.printable(Path(os.path.abspath(folder)).name)


def is_file(texts: Sequence[str]) -> bool:
    """Whether these arguments are a file of methods."""
    return len(texts) == 1 and Path(texts[0]).suffix.lower() in YAML_SUFFIXES and not Path(texts[0]).is_dir()


def free_key(name: str, keys: Collection[str]) -> str:
    """The key of another training of a method: its name, or "name (2)" and so on if that is taken."""
    number, key = 1, name
    while key in keys:
        number += 1
        key = f"{name} ({number})"
    return key


def from_file(path: Path, names: MaskNames) -> dict[str, Training]:
    """The trainings in a YAML file, whose folders are relative to the file's."""
    trainings: dict[str, Training] = {}
    for name, entry in read(path).items():
        folders = entry.get("folder", name)
        map_names = MaskNames(entry.get("prefix", names.prefix), entry.get("suffix", names.suffix))
        for folder in [folders] if isinstance(folders, str) else folders:
            about = about_of(name, entry)
            trainings[free_key(about.name, trainings)] = Training(path.parent / folder, map_names, about)
    return trainings


def about_of(name: str, entry: Mapping[str, str]) -> About:
    name = files.printable(entry.get("name", name))
    return About(name, *(files.printable(entry.get(key, "")) for key in ("cite", "year", "venue")))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a YAML file of methods, by name. Raises InputError or OSError."""
    try:
        content = yaml.load(path.read_text("utf-8"), TextLoader)
        if not content or not isinstance(content, dict):
            raise InputError("it has no methods")
        entries = {name: entry if isinstance(entry, dict) else {"folder": entry} for name, entry in content.items()}
        for name, entry in entries.items():
            check(name, entry)
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: does not describe methods, see docs/benchmarks.md: {reason}") from error
    names = [about_of(*item).name for item in entries.items()]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: two methods are called {repeated[0]}; for several trainings, give a list of folders")
    return entries


def check(name: str, entry: Mapping[str, Any]) -> None:
    """Raises InputError unless an entry consists of texts, or of a list of them for `folder`."""
    if unknown := entry.keys() - set(KEYS):
        raise InputError(f"{name}: {min(unknown)} is unknown; known are {', '.join(KEYS)}")
    for key, value in entry.items():
        texts = value if key == "folder" and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{name}: {key} is not a text")
