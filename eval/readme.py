"""A README.md as others wrote it, of which flaxqa changes only what is its own.

Two things are its own: the sections between a pair of markers, `<!-- flaxqa:NAME -->` and
`<!-- /flaxqa:NAME -->`, and single keys of the front matter. Everything else stays byte for byte.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flaxqa.errors import DataError, all_problems

BOM = "\ufeff"
MARKER = re.compile(r"<!--\s*(/?)flaxqa:([\w-]+)\s*-->")
EMPTY = re.compile(r"(\s*---[ \t]*\r?\n)(---[ \t]*(?:\r?\n|$))")
OPENED = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)")


@dataclasses.dataclass(frozen=True)
class Readme:
    """A file in pieces: put one after the other they are the file.

    Attributes:
      name: of the file, for messages.
      head: what stands before the YAML, its opening line included; "" without front matter.
      matter: the YAML.
      tail: the closing line; "" without front matter.
      body: the Markdown.
      metadata: what the YAML says.
      newline: what ends the file's lines.
    """

    name: str
    head: str = ""
    matter: str = ""
    tail: str = ""
    body: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    newline: str = "\n"

    def sections(self) -> dict[str, str]:
        """The sections of flaxqa's that the file has, with their markers.

        Raises:
          DataError: a marker has lost its partner.
        """
        return {name: self.body[a:b] for name, (a, b) in places(self.body, self.name).items()}


def parse(content: bytes, name: str) -> Readme:
    """A file taken apart.

    Args:
      content: of the file.
      name: what messages call it.

    Raises:
      DataError: it is not UTF-8, its front matter is broken, or a marker has lost its partner.
    """
    from huggingface_hub import repocard

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: {error}") from error
    first = re.search(r"\r?\n", text)
    newline = first[0] if first else "\n"
    bom = BOM if text.startswith(BOM) else ""
    text = text.removeprefix(BOM)
    found = repocard.REGEX_YAML_BLOCK.match(text)
    if empty := EMPTY.match(text):
        readme = Readme(name, bom + empty[1], "", empty[2], text[empty.end() :], {}, newline)
    elif found is None:
        if OPENED.match(text):
            raise DataError(
                f"{name}: its front matter begins with --- and has no line --- to end it"
            )
        readme = Readme(name, head=bom, body=text, newline=newline)
    else:
        head, matter, tail = found.group(1, 2, 3)
        metadata = metadata_of(matter, text, name)
        body = text[found.end() :]
        readme = Readme(name, bom + head, matter, tail, body, metadata, newline)
    places(readme.body, name)
    return readme


def metadata_of(matter: str, text: str, name: str) -> dict[str, Any]:
    """What the front matter says.

    Raises:
      DataError: it is no YAML, no mapping, has a key twice, or a model-index of another form.
    """
    import huggingface_hub
    import yaml

    try:
        node = yaml.compose(matter, Loader=yaml.SafeLoader)
        huggingface_hub.ModelCard(text)  # as the hub reads it
        found = yaml.safe_load(matter)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DataError(f"{name}: its front matter cannot be read: {error}") from error
    keys = [key.value for key, _ in node.value] if node is not None else []
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise DataError(f"{name}: its front matter has {', '.join(twice)} twice")
    return found or {}


def places(body: str, name: str) -> dict[str, tuple[int, int]]:
    """Where the sections are, markers included.

    Raises:
      DataError: a marker has lost its partner, or a section is there twice; names every one.
    """
    found: dict[str, tuple[int, int]] = {}
    problems = []
    opened: re.Match[str] | None = None
    for one in MARKER.finditer(body):
        closes, section = bool(one[1]), one[2]
        if closes and opened is not None and opened[2] == section:
            if section in found:
                problems.append(f"the section {section} is there twice")
            found[section] = opened.start(), one.end()
            opened = None
            continue
        if closes:
            problems.append(f"{one[0]} closes what is not open")
        else:
            if opened is not None:
                problems.append(f"{opened[0]} is not closed")
            opened = one
    if opened is not None:
        problems.append(f"{opened[0]} is not closed")
    if problems:
        hint = "put the marker back, or remove what is left of its section"
        raise DataError(all_problems(f"{name} has damaged markers; {hint}", problems))
    return found


# --- the body ---


def with_sections(readme: Readme, sections: Mapping[str, str], order: Sequence[str]) -> Readme:
    """The file with these sections: each in its place, or where it belongs beside the others.

    Args:
      readme: the file.
      sections: Markdown of each, without its markers.
      order: of all sections that there can be.
    """
    body = readme.body
    for name in sorted(sections, key=order.index):
        block = f"<!-- flaxqa:{name} -->\n\n{sections[name].strip()}\n\n<!-- /flaxqa:{name} -->"
        block = block.replace("\n", readme.newline)
        there = places(body, readme.name)
        gap = 2 * readme.newline
        before = [there[one][1] for one in order[: order.index(name)] if one in there]
        after = [there[one][0] for one in order[order.index(name) :] if one in there]
        if name in there:
            begin, end = there[name]
            body = body[:begin] + block + body[end:]
        elif before:
            body = body[: max(before)] + gap + block + body[max(before) :]
        elif after:
            body = body[: min(after)] + block + gap + body[min(after) :]
        else:
            ends = re.search(r"(?:\r\n|\n)*\Z", body)
            lines = ends[0].count("\n") if ends else 0
            body += max(2 - lines, 0) * readme.newline if body.strip() else ""
            body += block + readme.newline
    return dataclasses.replace(readme, body=body)


# --- the front matter ---


def with_metadata(readme: Readme, wanted: Mapping[str, Any]) -> tuple[Readme, bool]:
    """The file with this metadata, and whether all of the YAML that stayed is as it was written.

    Only the keys whose values change are written anew, so that comments, order and quotes of the
    others stay. YAML in which that cannot be (braces around everything, anchors) is written whole.
    """
    import yaml

    if readme.metadata == wanted and readme.tail:
        return readme, True
    matter = spliced(readme, wanted)
    try:
        kept = yaml.safe_load(matter) == dict(wanted)
    except yaml.YAMLError:
        kept = False
    if not kept:
        matter = dumped(wanted).replace("\n", readme.newline)
    head, tail = readme.head, readme.tail
    if not tail:
        head, tail = f"{head}---{readme.newline}", f"---{readme.newline}"
    if not tail.startswith(("\r", "\n")):
        tail = readme.newline + tail
    changed = dataclasses.replace(readme, head=head, matter=matter, tail=tail, metadata=wanted)
    return changed, kept


def spliced(readme: Readme, wanted: Mapping[str, Any]) -> str:
    """The YAML with other values of the keys that change, and new keys at its end.

    Args:
      readme: the file.
      wanted: all keys that it has, and perhaps more.
    """
    import yaml

    matter, newline = readme.matter, readme.newline
    node = yaml.compose(matter, Loader=yaml.SafeLoader)
    pairs = [] if node is None else node.value
    for key, value in reversed(pairs):
        name = key.value
        if name in wanted and wanted[name] != readme.metadata.get(name):
            begin, end = key.start_mark.index, end_of(value)
            text = dumped({name: wanted[name]}).replace("\n", newline)
            text += newline if matter[begin:end].endswith("\n") else ""
            matter = matter[:begin] + text + matter[end:]
    new = {name: value for name, value in wanted.items() if name not in readme.metadata}
    if new:
        gap = newline if matter.strip() and not matter.endswith("\n") else ""
        matter += gap + dumped(new).replace("\n", newline)
    return matter


def end_of(node: Any) -> int:
    """Where a value ends; that of a block without the comments and empty lines after it."""
    import yaml

    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return end_of(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def dumped(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip("\n")


def whole(readme: Readme) -> bytes:
    """The content of the file."""
    return (readme.head + readme.matter + readme.tail + readme.body).encode(errors="replace")
