"""The ``filer`` command.  One file per verb; each is a thin client of the library.

Exit status: 0 done · 1 the operation failed · 2 wrong usage · 64 the configuration cannot work ·
69 no node is running.  Errors are a line of what went wrong and a line of what to do.
"""

from __future__ import annotations

from filer.cli.check_config import check_config
from filer.cli.errors import FilerGroup
from filer.cli.evict import evict
from filer.cli.explain import explain
from filer.cli.flush import flush
from filer.cli.group import filer
from filer.cli.serve import serve
from filer.cli.status import status
from filer.cli.top import top
from filer.cli.warm import warm

for verb in (serve, status, top, warm, flush, evict, explain, check_config):
    filer.add_command(verb)

__all__ = ["FilerGroup", "filer"]
