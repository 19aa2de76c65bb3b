"""Finding pictures, films and sounds that a record names as other projects do, in keys and in the text.

Here a picture is under "image" and its place is `<image>`. A medium that is named in another way would be lost silently, and the
conversation would be trained on without it. The names are a closed list. Some have other meanings too: so a key counts only if
it holds something, and a word in brackets that may be HTML or code does not count where the text looks like either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .template_writer import IMAGE

_PICTURE = "image|img|picture|pic|photo|screenshot|pixel"
_OTHER = "video|vid|movie|frame|audio|sound|speech|wav|point_?cloud|pcd|media"
# "video", "videos" or, with more about it, "video_path", "num_videos", "videoUrl".
_KEY = re.compile(
    rf"(.*[^a-z])?({_PICTURE}|{_OTHER})(?:s|es)?((?:path|file|url|uri|name|list|id|data)?s?(?:[^a-z].*)?)", re.S
)

# <video>, <image_0>, <img>, <ImageHere>, <image-placeholder>, <|image_pad|>, <image/>, <start_of_image>, <im_patch>
_MORE = "here|context|pad|patch|start|end|begin|bos|eos|placeholder|token|soft|features?|[0-9]"
_PLACE = re.compile(
    rf"(?<!\w)< ?[|]? ?(?P<of>(?:start|begin|end)[ _-]?of[ _-]?)?"
    rf"(?:(?P<picture>image|img|picture|pic|photo|vision|im(?=[ _-]?patch))|video|vid|audio|sound|speech)s?"
    rf"(?P<more>(?:[ _:#-]?(?:{_MORE}))*) ?[|/]? ?>",
    re.IGNORECASE,
)
# In a text that looks like code, a plain word in brackets may be a tag or a type.
_CODE = re.compile(
    r"`|\b(?:html5?|xml|svg|jsx|css)\b|<\w+\s[^<>]*=|<\w+\s*/?>\s*(?:tags?|elements?|components?)\b"
    r"|</(?!(?:image|img|picture|pic|photo|video|vid|audio|sound|speech)\b)",
    re.IGNORECASE,
)


def foreign_key(fields: Mapping[str, Any], pictures: bool) -> str | None:
    """A key that names a medium and holds something; None if there is none.

    `pictures` says that the conversation has some. A key such as "image_id", with more than a medium's name, is then about them.
    """
    for key, value in fields.items():
        medium = _medium(key)
        if medium and value and (not pictures or (medium == "all" and isinstance(value, str | list | dict))):
            return key
    return None


@lru_cache(maxsize=1024)
def _medium(key: str) -> str | None:
    """Whether "all" of a key, or "part" of it, is a medium's name; None if nothing is."""
    if len(key) > 100:
        return None
    found = _KEY.fullmatch(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
    return found and ("part" if found[1] or found[3] else "all")


def foreign_place(text: str, pictures: bool) -> str | None:
    """A placeholder for a medium other than `<image>`; None if there is none. `pictures`: as in `foreign_key`."""
    for found in _PLACE.finditer(text):
        word = found[0]
        if word == IMAGE or (pictures and found["picture"]):
            continue
        if "|" in word or found["of"] or found["more"] or not _CODE.search(text):
            return word
    return None
