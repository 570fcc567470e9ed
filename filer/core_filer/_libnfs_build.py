"""Compiles ``filer.core_filer._libnfs``: what we use of libnfs's raw RPC interface.

Owns the declarations only.  The raw interface encodes one NFSv3 call, sends it and decodes its
reply; paths, mounts, caches and reconnects of libnfs's upper layers are not used.  The C
compiler checks every declaration below against the installed headers.
"""

from __future__ import annotations

from cffi import FFI

ffibuilder = FFI()

ffibuilder.set_source(
    "filer.core_filer._libnfs",
    """
    #include <nfsc/libnfs.h>
    #include <nfsc/libnfs-raw.h>
    #include <nfsc/libnfs-raw-mount.h>
    #include <nfsc/libnfs-raw-nfs.h>
    """,
    libraries=["nfs"],
)

_TYPES = """
typedef struct nfs_fh3 { struct { unsigned int data_len; char *data_val; } data; } nfs_fh3;
typedef struct diropargs3 { nfs_fh3 dir; char *name; } diropargs3;
typedef struct specdata3 { unsigned int specdata1; unsigned int specdata2; } specdata3;
typedef struct nfstime3 { unsigned int seconds; unsigned int nseconds; } nfstime3;
typedef struct fattr3 {
    unsigned int type; unsigned int mode; unsigned int nlink; unsigned int uid; unsigned int gid;
    uint64_t size; uint64_t used; specdata3 rdev; uint64_t fsid; uint64_t fileid;
    nfstime3 atime; nfstime3 mtime; nfstime3 ctime;
} fattr3;
typedef struct post_op_attr {
    uint32_t attributes_follow;
    union { fattr3 attributes; } post_op_attr_u;
} post_op_attr;
typedef struct wcc_attr { uint64_t size; nfstime3 mtime; nfstime3 ctime; } wcc_attr;
typedef struct pre_op_attr {
    uint32_t attributes_follow;
    union { wcc_attr attributes; } pre_op_attr_u;
} pre_op_attr;
typedef struct wcc_data { pre_op_attr before; post_op_attr after; } wcc_data;
typedef struct post_op_fh3 {
    uint32_t handle_follows;
    union { nfs_fh3 handle; } post_op_fh3_u;
} post_op_fh3;

typedef struct set_mode3 { uint32_t set_it; union { unsigned int mode; } set_mode3_u; } set_mode3;
typedef struct set_uid3 { uint32_t set_it; union { unsigned int uid; } set_uid3_u; } set_uid3;
typedef struct set_gid3 { uint32_t set_it; union { unsigned int gid; } set_gid3_u; } set_gid3;
typedef struct set_size3 { uint32_t set_it; union { uint64_t size; } set_size3_u; } set_size3;
typedef struct set_atime { unsigned int set_it; union { nfstime3 atime; } set_atime_u; } set_atime;
typedef struct set_mtime { unsigned int set_it; union { nfstime3 mtime; } set_mtime_u; } set_mtime;
typedef struct sattr3 {
    set_mode3 mode; set_uid3 uid; set_gid3 gid; set_size3 size; set_atime atime; set_mtime mtime;
} sattr3;

struct GETATTR3args { nfs_fh3 object; };
struct SETATTR3args { nfs_fh3 object; sattr3 new_attributes; ...; };
struct LOOKUP3args { diropargs3 what; };
struct READLINK3args { nfs_fh3 symlink; };
struct READ3args { nfs_fh3 file; uint64_t offset; unsigned int count; };
struct WRITE3args {
    nfs_fh3 file; uint64_t offset; unsigned int count; unsigned int stable;
    struct { unsigned int data_len; char *data_val; } data;
};
struct COMMIT3args { nfs_fh3 file; uint64_t offset; unsigned int count; };
typedef struct createhow3 {
    unsigned int mode;
    union { sattr3 g_obj_attributes; } createhow3_u;
} createhow3;
struct CREATE3args { diropargs3 where; createhow3 how; };
struct MKDIR3args { diropargs3 where; sattr3 attributes; };
typedef struct symlinkdata3 { sattr3 symlink_attributes; char *symlink_data; } symlinkdata3;
struct SYMLINK3args { diropargs3 where; symlinkdata3 symlink; };
typedef struct devicedata3 { sattr3 dev_attributes; specdata3 spec; } devicedata3;
typedef struct mknoddata3 {
    unsigned int type;
    union { devicedata3 chr_device; sattr3 pipe_attributes; } mknoddata3_u;
} mknoddata3;
struct MKNOD3args { diropargs3 where; mknoddata3 what; };
struct REMOVE3args { diropargs3 object; };
struct RMDIR3args { diropargs3 object; };
struct RENAME3args { diropargs3 from; diropargs3 to; };
struct LINK3args { nfs_fh3 file; diropargs3 link; };
struct READDIR3args { nfs_fh3 dir; uint64_t cookie; char cookieverf[8]; unsigned int count; };
struct READDIRPLUS3args {
    nfs_fh3 dir; uint64_t cookie; char cookieverf[8];
    unsigned int dircount; unsigned int maxcount;
};
struct FSSTAT3args { nfs_fh3 fsroot; };
struct FSINFO3args { nfs_fh3 fsroot; };

typedef struct GETATTR3resok { fattr3 obj_attributes; } GETATTR3resok;
typedef struct SETATTR3resok { wcc_data obj_wcc; } SETATTR3resok;
typedef struct LOOKUP3resok {
    nfs_fh3 object; post_op_attr obj_attributes; post_op_attr dir_attributes;
} LOOKUP3resok;
typedef struct READLINK3resok { post_op_attr symlink_attributes; char *data; } READLINK3resok;
typedef struct READ3resok {
    post_op_attr file_attributes; unsigned int count; uint32_t eof;
    struct { unsigned int data_len; char *data_val; } data;
} READ3resok;
typedef struct WRITE3resok {
    wcc_data file_wcc; unsigned int count; unsigned int committed; char verf[8];
} WRITE3resok;
typedef struct COMMIT3resok { wcc_data file_wcc; char verf[8]; } COMMIT3resok;
typedef struct CREATE3resok {
    post_op_fh3 obj; post_op_attr obj_attributes; wcc_data dir_wcc;
} CREATE3resok;
typedef struct MKDIR3resok {
    post_op_fh3 obj; post_op_attr obj_attributes; wcc_data dir_wcc;
} MKDIR3resok;
typedef struct SYMLINK3resok {
    post_op_fh3 obj; post_op_attr obj_attributes; wcc_data dir_wcc;
} SYMLINK3resok;
typedef struct MKNOD3resok {
    post_op_fh3 obj; post_op_attr obj_attributes; wcc_data dir_wcc;
} MKNOD3resok;
typedef struct REMOVE3resok { wcc_data dir_wcc; } REMOVE3resok;
typedef struct RMDIR3resok { wcc_data dir_wcc; } RMDIR3resok;
typedef struct RENAME3resok { wcc_data fromdir_wcc; wcc_data todir_wcc; } RENAME3resok;
typedef struct LINK3resok { post_op_attr file_attributes; wcc_data linkdir_wcc; } LINK3resok;
typedef struct entry3 {
    uint64_t fileid; char *name; uint64_t cookie; struct entry3 *nextentry;
} entry3;
typedef struct READDIR3resok {
    post_op_attr dir_attributes; char cookieverf[8];
    struct { entry3 *entries; uint32_t eof; } reply;
} READDIR3resok;
typedef struct entryplus3 {
    uint64_t fileid; char *name; uint64_t cookie; post_op_attr name_attributes;
    post_op_fh3 name_handle; struct entryplus3 *nextentry;
} entryplus3;
typedef struct READDIRPLUS3resok {
    post_op_attr dir_attributes; char cookieverf[8];
    struct { entryplus3 *entries; uint32_t eof; } reply;
} READDIRPLUS3resok;
typedef struct FSSTAT3resok {
    post_op_attr obj_attributes;
    uint64_t tbytes; uint64_t fbytes; uint64_t abytes;
    uint64_t tfiles; uint64_t ffiles; uint64_t afiles;
    unsigned int invarsec;
} FSSTAT3resok;
typedef struct FSINFO3resok {
    post_op_attr obj_attributes;
    unsigned int rtmax; unsigned int rtpref; unsigned int rtmult;
    unsigned int wtmax; unsigned int wtpref; unsigned int wtmult;
    unsigned int dtpref; uint64_t maxfilesize; nfstime3 time_delta; unsigned int properties;
} FSINFO3resok;

typedef struct { unsigned int fhandle3_len; char *fhandle3_val; } fhandle3;
typedef struct mountres3_ok { fhandle3 fhandle;
    struct { unsigned int auth_flavors_len; int *auth_flavors_val; } auth_flavors;
} mountres3_ok;
typedef struct mountres3 {
    unsigned int fhs_status;
    union { mountres3_ok mountinfo; } mountres3_u;
} mountres3;
"""

_FUNCTIONS = """
#define RPC_STATUS_SUCCESS ...

struct rpc_context;
struct AUTH;
typedef void (*rpc_cb)(struct rpc_context *, int, void *, void *);

extern "Python" void libnfs_replied(struct rpc_context *, int, void *, void *);

struct rpc_context *rpc_init_context(void);
void rpc_destroy_context(struct rpc_context *);
void rpc_set_auth(struct rpc_context *, struct AUTH *);
struct AUTH *libnfs_authunix_create(const char *, uint32_t, uint32_t, uint32_t, uint32_t *);
int rpc_get_fd(struct rpc_context *);
int rpc_which_events(struct rpc_context *);
int rpc_service(struct rpc_context *, int);
char *rpc_get_error(struct rpc_context *);
int rpc_connect_async(struct rpc_context *, const char *, int, rpc_cb, void *);

int rpc_pmap2_null_async(struct rpc_context *, rpc_cb, void *);
int rpc_pmap2_getport_async(struct rpc_context *, int, int, int, rpc_cb, void *);
int rpc_mount3_mnt_async(struct rpc_context *, rpc_cb, char *, void *);
int rpc_mount3_null_async(struct rpc_context *, rpc_cb, void *);
int rpc_nfs3_null_async(struct rpc_context *, rpc_cb, void *);
"""

_PROCEDURES = (
    "getattr", "setattr", "lookup", "readlink", "read", "write", "commit", "create", "mkdir",
    "symlink", "mknod", "remove", "rmdir", "rename", "link", "readdir", "readdirplus", "fsstat",
    "fsinfo",
)

_PER_PROCEDURE = """
typedef struct {NAME}3res {{
    unsigned int status;
    union {{ {NAME}3resok resok; }} {NAME}3res_u;
}} {NAME}3res;
int rpc_nfs3_{name}_async(struct rpc_context *, rpc_cb, struct {NAME}3args *, void *);
"""

ffibuilder.cdef(
    _TYPES + _FUNCTIONS
    + "".join(_PER_PROCEDURE.format(name=name, NAME=name.upper()) for name in _PROCEDURES)
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
