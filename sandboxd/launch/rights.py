"""What is left of a process of ours that handles files of others: four capabilities over files."""

from __future__ import annotations

import os
import resource
import signal

from sandboxd.linux import capabilities
from sandboxd.linux.process import die_with_parent, no_new_privileges


def keep_rights_over_files() -> None:
    """Give up everything else, for good; the process ends with its parent and dumps no core."""
    capabilities.keep_only(
        capabilities.CAP_CHOWN,
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_DAC_READ_SEARCH,
        capabilities.CAP_FOWNER,
    )
    no_new_privileges()
    die_with_parent(signal.SIGKILL)  # after what clears it: a change of credentials (prctl(2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0)
