"""Compiled parts; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # Interposes on libfuse for pyfuse3 (docs: ARCHITECTURE.md, "The FUSE boundary").
        Extension(
            "filer.vfs._fuse_shim",
            ["filer/vfs/_fuse_shim.c"],
            define_macros=[("_FILE_OFFSET_BITS", "64")],
            include_dirs=["/usr/include/fuse3"],
            libraries=["fuse3"],
        ),
        # Preloaded into NFS-Ganesha: a stable fsid for each volume.
        Extension("filer.supervisor._fsid_preload", ["filer/supervisor/_fsid_preload.c"]),
        # The same, where the node leaves rpcbind alone.
        Extension("filer.supervisor._no_rpcbind", ["filer/supervisor/_no_rpcbind.c"]),
    ],
    cffi_modules=["filer/core_filer/_libnfs_build.py:ffibuilder"],
)
