"""Failures that are known, with the reason, for each way to reach a file system.

``nfs3`` and ``nfs41`` are those of any directory that NFS-Ganesha exports through FSAL_VFS, also
of plain ext4: the filer may fail this over NFS, and nothing else.
"""

from __future__ import annotations

_NFS = {
    "attributes.a_truncation_by_an_ordinary_user_clears_setuid":
        "Ganesha truncates with the capability that keeps setuid",
    "directories.a_removed_directory_that_is_still_open_is_empty":
        "the server forgets a removed directory, so that its handle is stale",
    "directories.names_that_nobody_touches_are_seen_exactly_once_while_others_change":
        "sometimes Linux 6.1 gives names again; a client without a kernel never gets them twice"
        " (tests/e2e/test_listings.py)",
    "times.times_of_a_symlink_are_its_own":
        "Ganesha sets the times of a symlink through a descriptor that it cannot open",
    "unlinks.an_unlinked_open_file_has_no_links":
        "NFS has no open files: the client renames the file to .nfs… until it is closed",
    "unlinks.a_directory_can_go_once_its_open_files_are_unlinked":
        "NFS has no open files: the .nfs… file is still in the directory",
}

_NFS3 = _NFS | {
    "creation.a_special_file_can_be_renamed_linked_and_removed":
        "Ganesha looks a socket up by the name it had when its handle was made",
    "times.a_time_within_the_first_second_is_kept":
        "Ganesha takes zero seconds for a time that was not given",
    "times.times_after_2038_are_kept":
        "Ganesha takes the seconds of NFSv3 for signed ones",
}
_BEHIND_NFS = {
    "creation.a_special_file_can_be_renamed_linked_and_removed":
        "the NAS of the tests is Ganesha: see nfs3",
    "links.a_symlinks_target_may_have_4095_bytes":
        "libnfs encodes the arguments of a call in 4 KiB",
    "times.a_new_file_was_last_read_when_it_was_made":
        "the access time of a new file carries the mark by which a lost answer is recognised",
}
"""Of the filer in front of a NAS that it reaches over NFS."""

KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "native": {},
    "nfs3": _NFS3,
    "nfs41": _NFS,
    "filer": {},
    "filer-nfs": _BEHIND_NFS,
    "filer-nfs3": _NFS3,
    "filer-nfs41": _NFS,
}
