/*
 * What pyfuse3 leaves out of libfuse, added by interposition.
 *
 * This module makes itself global to the dynamic linker and must be imported before pyfuse3 (see
 * shim.py).  The linker then binds pyfuse3's calls to the functions here, which call libfuse:
 *
 *   fuse_session_new          the operation table is wrapped: handlers that get a file handle
 *                             get the inode in it.  With stateless opens (OPEN and OPENDIR
 *                             answered ENOSYS) there is no other handle, and pyfuse3 does not
 *                             hand the inode on.
 *   fuse_session_receive_buf  requests are read without blocking into one shared buffer,
 *                             instead of 1 MiB for every task that waits for a request.
 *   fuse_session_process_buf  the header of the request being dispatched is remembered, so
 *                             that a handler can learn its `unique`.
 *
 * All of it runs in the thread that runs the session's event loop and holds the GIL.  Nothing
 * here is thread-safe, nothing needs to be.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 312
#include <fuse3/fuse_lowlevel.h>

#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* The kernel refuses reads shorter than one WRITE with its headers: 1 MiB of data and a page,
   which is also what libfuse 3 allocates. */
#define WRITE_BYTES_MAX (1u << 20)
#define HEADER_BYTES 4096

/* Upper bounds given to the kernel in the answer to FUSE_INIT.  Background requests (read-ahead)
   are held back above the first; at libfuse's 12 cold reads over a slow link ran at half speed. */
#define BACKGROUND_REQUESTS_MAX 256
#define CONGESTION_THRESHOLD 192
/* Never raises what sysfs says for the mount (the keeper wrote it), but would lower it. */
#define READ_AHEAD_BYTES_MAX (8u << 20)

/* The first fields of struct fuse_in_header, which every request starts with. */
struct request_header {
	uint32_t len;
	uint32_t opcode;
	uint64_t unique;
	uint64_t nodeid;
};

static struct fuse_session *session;
static struct fuse_lowlevel_ops handlers; /* pyfuse3's own */
static struct {
	unsigned capable, want, max_write, max_readahead, max_background;
	int is_initialised;
} connection;
static struct request_header current;

static char buffer[WRITE_BYTES_MAX + HEADER_BYTES] __attribute__((aligned(4096)));
static size_t buffer_filled; /* bytes of a request that was received but not yet collected */

/* ---- libfuse's own functions ------------------------------------------------------------ */

static struct fuse_session *(*real_session_new)(struct fuse_args *,
						const struct fuse_lowlevel_ops *, size_t, void *);
static void (*real_process_buf)(struct fuse_session *, const struct fuse_buf *);
static void (*real_session_destroy)(struct fuse_session *);

static int interpose(void)
{
	Dl_info self;

	/* Python loads extensions as local; this finds ours again and makes it global. */
	if (!dladdr((void *)interpose, &self) ||
	    dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL) == NULL)
		return -1;
	/* Not RTLD_NEXT: what comes "next" depends on how the interpreter was started. */
	void *libfuse = dlopen("libfuse3.so.3", RTLD_LAZY | RTLD_LOCAL);
	if (libfuse == NULL)
		return -1;
	real_session_new = dlsym(libfuse, "fuse_session_new");
	real_process_buf = dlsym(libfuse, "fuse_session_process_buf");
	real_session_destroy = dlsym(libfuse, "fuse_session_destroy");
	return real_session_new && real_process_buf && real_session_destroy ? 0 : -1;
}

/* ---- fuse_session_new: the inode as file handle ------------------------------------------- */

#define WITH_INODE_AS_HANDLE                   \
	struct fuse_file_info with_inode = *fi; \
	with_inode.fh = inode

static void on_init(void *userdata, struct fuse_conn_info *conn)
{
	handlers.init(userdata, conn);
	/* Without OPEN requests the kernel would have nowhere to send O_TRUNC: the truncation
	   would be lost silently.  With this off it sends a SETATTR. */
	conn->want &= ~FUSE_CAP_ATOMIC_O_TRUNC;
	/* Requests are read by read(2) below: two system calls fewer for a small one. */
	conn->want &= ~FUSE_CAP_SPLICE_READ;
	if (conn->max_write > WRITE_BYTES_MAX)
		conn->max_write = WRITE_BYTES_MAX;
	conn->max_readahead = READ_AHEAD_BYTES_MAX;
	conn->max_background = BACKGROUND_REQUESTS_MAX;
	conn->congestion_threshold = CONGESTION_THRESHOLD;

	connection.capable = conn->capable;
	connection.want = conn->want;
	connection.max_write = conn->max_write;
	connection.max_readahead = conn->max_readahead;
	connection.max_background = conn->max_background;
	connection.is_initialised = 1;
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t start,
		    struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.read(request, inode, size, start, &with_inode);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size,
		     off_t start, struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.write(request, inode, data, size, start, &with_inode);
}

static void on_write_buf(fuse_req_t request, fuse_ino_t inode, struct fuse_bufvec *data,
			 off_t start, struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.write_buf(request, inode, data, start, &with_inode);
}

static void on_flush(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.flush(request, inode, &with_inode);
}

static void on_release(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.release(request, inode, &with_inode);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int datasync,
		     struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.fsync(request, inode, datasync, &with_inode);
}

static void on_readdirplus(fuse_req_t request, fuse_ino_t inode, size_t size, off_t start,
			   struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.readdirplus(request, inode, size, start, &with_inode);
}

static void on_releasedir(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.releasedir(request, inode, &with_inode);
}

static void on_fsyncdir(fuse_req_t request, fuse_ino_t inode, int datasync,
			struct fuse_file_info *fi)
{
	WITH_INODE_AS_HANDLE;
	handlers.fsyncdir(request, inode, datasync, &with_inode);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *attributes, int to_set,
		       struct fuse_file_info *fi)
{
	if (fi == NULL) {
		handlers.setattr(request, inode, attributes, to_set, NULL);
		return;
	}
	WITH_INODE_AS_HANDLE;
	handlers.setattr(request, inode, attributes, to_set, &with_inode);
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
				      size_t ops_size, void *userdata)
{
	struct fuse_lowlevel_ops wrapped;

	memset(&handlers, 0, sizeof(handlers));
	memcpy(&handlers, ops, ops_size < sizeof(handlers) ? ops_size : sizeof(handlers));
	wrapped = handlers;
#define WRAP(name)                 \
	if (handlers.name != NULL) \
	wrapped.name = on_##name
	WRAP(init);
	WRAP(read);
	WRAP(write);
	WRAP(write_buf);
	WRAP(flush);
	WRAP(release);
	WRAP(fsync);
	WRAP(readdirplus);
	WRAP(releasedir);
	WRAP(fsyncdir);
	WRAP(setattr);
#undef WRAP
	/* Byte-range locks stay with the kernel, hence with this node: pyfuse3 has no handlers
	   for them.  Locks that span nodes are added here, as `wrapped.setlk` and `.getlk`. */

	memset(&connection, 0, sizeof(connection));
	buffer_filled = 0;
	session = real_session_new(args, &wrapped, sizeof(wrapped), userdata);
	return session;
}

void fuse_session_destroy(struct fuse_session *se)
{
	if (se == session)
		session = NULL;
	real_session_destroy(se);
}

/* ---- fuse_session_receive_buf, fuse_session_process_buf ----------------------------------- */

/* Read one request: its length, 0 when the connection has ended, or -errno (-EAGAIN: none). */
static ssize_t read_request(struct fuse_session *se)
{
	for (;;) {
		ssize_t length = read(fuse_session_fd(se), buffer, sizeof(buffer));
		if (length >= (ssize_t)sizeof(struct request_header))
			return length;
		if (length >= 0)
			return -EIO;
		if (errno == ENOENT) /* withdrawn by its sender just now */
			continue;
		if (errno == ENODEV || errno == EBADF) {
			fuse_session_exit(se);
			return 0;
		}
		return -errno;
	}
}

int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	if (buffer_filled == 0) {
		ssize_t length = read_request(se);
		if (length <= 0)
			return length == -EAGAIN ? -EINTR : (int)length; /* pyfuse3 asks again */
		buffer_filled = (size_t)length;
	}
	buf->mem = buffer;
	buf->size = buffer_filled;
	buf->flags = 0;
	buffer_filled = 0;
	return (int)buf->size;
}

void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	memcpy(&current, buf->mem, sizeof(current));
	real_process_buf(se, buf);
	/* pyfuse3 frees what it finds here.  The handler has copied what it needs: its arguments
	   are made before this returns. */
	if (buf->mem == buffer)
		((struct fuse_buf *)buf)->mem = NULL;
}

/* ---- for Python --------------------------------------------------------------------------- */

static int require_session(void)
{
	if (session != NULL)
		return 0;
	PyErr_SetString(PyExc_RuntimeError, "no FUSE session, or pyfuse3 was imported before this module");
	return -1;
}

PyDoc_STRVAR(current_unique_doc,
"current_unique() -> int\n\n"
"The `unique` of the request that was dispatched last.  At the first line of a handler, before\n"
"any await, that is the handler's own request.");

static PyObject *current_unique(PyObject *self, PyObject *unused)
{
	return PyLong_FromUnsignedLongLong(current.unique);
}

PyDoc_STRVAR(receive_doc,
"receive(wait_us) -> int\n\n"
"Receive one request for the session's next fuse_session_receive_buf(), waiting for it up to\n"
"*wait_us* microseconds (the GIL is released meanwhile).  Returns 1 if there is one, 0 if not,\n"
"-1 when the connection has ended.  The descriptor must be non-blocking.");

static PyObject *receive(PyObject *self, PyObject *argument)
{
	long wait_us = PyLong_AsLong(argument);
	ssize_t length;

	if ((wait_us == -1 && PyErr_Occurred()) || require_session() < 0)
		return NULL;
	if (buffer_filled > 0)
		return PyLong_FromLong(1);
	length = read_request(session);
	if (length == -EAGAIN && wait_us > 0) {
		struct pollfd readable = {.fd = fuse_session_fd(session), .events = POLLIN};
		struct timespec wait = {.tv_sec = wait_us / 1000000,
					.tv_nsec = wait_us % 1000000 * 1000};
		int ready;
		Py_BEGIN_ALLOW_THREADS
		ready = ppoll(&readable, 1, &wait, NULL);
		Py_END_ALLOW_THREADS
		if (ready > 0 && session != NULL)
			length = read_request(session);
	}
	if (length > 0) {
		buffer_filled = (size_t)length;
		return PyLong_FromLong(1);
	}
	if (length == 0)
		return PyLong_FromLong(-1);
	if (length == -EAGAIN || length == -EINTR)
		return PyLong_FromLong(0);
	errno = (int)-length;
	return PyErr_SetFromErrno(PyExc_OSError);
}

PyDoc_STRVAR(process_init_doc,
"process_init(request)\n\n"
"Let the session process this FUSE_INIT request, as if it had been received.");

static PyObject *process_init(PyObject *self, PyObject *argument)
{
	struct fuse_buf request = {.flags = 0};
	Py_ssize_t length;

	if (PyBytes_AsStringAndSize(argument, (char **)&request.mem, &length) < 0 ||
	    require_session() < 0)
		return NULL;
	if (length < (Py_ssize_t)sizeof(struct request_header) ||
	    (size_t)length > sizeof(buffer)) {
		PyErr_SetString(PyExc_ValueError, "not a FUSE_INIT request");
		return NULL;
	}
	request.size = (size_t)length;
	real_process_buf(session, &request);
	if (PyErr_Occurred())
		return NULL;
	if (!connection.is_initialised) {
		PyErr_SetString(PyExc_RuntimeError, "libfuse refused the FUSE_INIT request");
		return NULL;
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(connection_info_doc,
"connection_info() -> dict\n\n"
"What was agreed in FUSE_INIT: capable, want, max_write, max_readahead, max_background.");

static PyObject *connection_info(PyObject *self, PyObject *unused)
{
	return Py_BuildValue("{sIsIsIsIsI}", "capable", connection.capable, "want", connection.want,
			     "max_write", connection.max_write, "max_readahead",
			     connection.max_readahead, "max_background", connection.max_background);
}

PyDoc_STRVAR(tune_malloc_doc,
"tune_malloc(mmap_threshold_bytes, trim_threshold_bytes)\n\n"
"mallopt(3): keep buffers below the first on the heap, and that much of it when free, in at most\n"
"two heaps.");

static PyObject *tune_malloc(PyObject *self, PyObject *args)
{
	int mmap_threshold, trim_threshold;

	if (!PyArg_ParseTuple(args, "ii", &mmap_threshold, &trim_threshold))
		return NULL;
	/* Each arena keeps its own free memory; by default there are eight for a processor. */
	if (!mallopt(M_ARENA_MAX, 2) ||
	    !mallopt(M_MMAP_THRESHOLD, mmap_threshold) ||
	    !mallopt(M_TRIM_THRESHOLD, trim_threshold)) {
		PyErr_SetString(PyExc_ValueError, "mallopt refused these values");
		return NULL;
	}
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"current_unique", current_unique, METH_NOARGS, current_unique_doc},
	{"receive", receive, METH_O, receive_doc},
	{"process_init", process_init, METH_O, process_init_doc},
	{"connection_info", connection_info, METH_NOARGS, connection_info_doc},
	{"tune_malloc", tune_malloc, METH_VARARGS, tune_malloc_doc},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "filer.vfs._fuse_shim",
	.m_doc = "What pyfuse3 leaves out of libfuse, added by interposition.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__fuse_shim(void)
{
	if (interpose() < 0) {
		PyErr_Format(PyExc_ImportError, "libfuse3.so.3 cannot be used: %s", dlerror());
		return NULL;
	}
	return PyModule_Create(&module);
}
