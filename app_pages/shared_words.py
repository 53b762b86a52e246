"""Words that nobody here wrote: file names, settings from a link, messages that quote them."""

from __future__ import annotations

import re

# what Streamlit's Markdown would act on, wherever it stands: emphasis, code, images, links, HTML, math, directives
MARKS = re.compile(r"[\\`*~$\[\]<>|&]|(?<!\w)_|_(?!\w)|:(?=[A-Za-z])|^\s*([#+-]|\d+(?=[.)]))")
# replaced after escapes are undone: `:material/home:`, `:smile:` and addresses; an invisible joiner keeps them apart
AFTERWARDS = re.compile(r":(?=material/|[\w+-]+:)|(?<=https:)(?=//)|(?<=http:)(?=//)|\bwww(?=\.)", re.IGNORECASE)
JOINER = "\u2060"


def plain(text: object) -> str:
    """The same words in one line, as Markdown that shows them as they are and fetches nothing."""
    line = " ".join(str(text).split())
    apart = AFTERWARDS.sub(lambda found: found[0] + JOINER, line)
    return MARKS.sub(lambda found: _escaped(found[0]), apart)


def _escaped(mark: str) -> str:
    """A number that would begin a list is escaped behind it."""
    return mark + "\\" if mark[-1].isdigit() else mark[:-1] + "\\" + mark[-1]
