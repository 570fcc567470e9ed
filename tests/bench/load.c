/*
 * A load generator that speaks NFSv3 itself: several clients (TCP connections), each with
 * several files in progress and several calls in flight for each file.
 *
 * Owns the wire (MOUNT v3, NFS v3, AUTH_SYS as root), the measurement, and the check of every
 * status, count and verifier.  Owns no policy: what is run, how often and against what is
 * decided by its caller, tests/bench/load.py.
 *
 *   load HOST NFS_PORT MOUNT_PORT EXPORT OPERATION [key=value ...]     one line of JSON
 *   load fill|check DIRECTORY [key=value ...]                          the same files, locally
 *
 * Operations; *names* are printf-formatted from name= with the item's number:
 *   read         LOOKUP, then READ to the end, sequentially          each=1: every client all files
 *   write        CREATE (unchecked, truncating), WRITE unstable, COMMIT
 *   getattr      GETATTR of handles looked up before the clock starts
 *   lookup       LOOKUP
 *   readdirplus  the whole directory from its first to its last entry
 *   remove       REMOVE
 *
 * Contents are a function of (seed, name, offset), so that any block can be checked wherever
 * and by whomever it is read: verify=2 compares every word, 1 one word in each 4 KiB, 0 none.
 * progress=1 adds a line {"progress": bytes} ten times a second.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOUNT = 100005, NFS = 100003 };
enum { MNT = 1 };
enum { GETATTR = 1, LOOKUP = 3, READ = 6, WRITE = 7, CREATE = 8, REMOVE = 12, READDIRPLUS = 17,
       COMMIT = 21 };
enum { NFS3ERR_JUKEBOX = 10008 };
enum { HANDLE_MAX = 64, CLIENTS_MAX = 64, IO_MAX = 1 << 20, STALL_LIMIT_S = 120,
       JUKEBOX_RETRY_MS = 100 };

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* -- options ------------------------------------------------------------------------------- */

static char *dir_path = "";
static char *name_format = "f%06ld";
static long file_count = 1, first_item = 0, client_count = 1, files_at_once = 1, window = 1;
static long repeat_count = 1, verify = 1, each_client = 0, tell_progress = 0;
static uint64_t file_bytes = 0, io_bytes = IO_MAX, seed = 1;

static void parse_options(int argc, char **argv)
{
    struct { const char *key; long *value; } longs[] = {
        {"files", &file_count}, {"first", &first_item}, {"clients", &client_count},
        {"files_at_once", &files_at_once}, {"window", &window}, {"repeats", &repeat_count},
        {"verify", &verify}, {"each", &each_client}, {"progress", &tell_progress},
    };
    for (int i = 0; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value)
            die("not key=value: %s", argv[i]);
        *value++ = 0;
        size_t k;
        for (k = 0; k < sizeof longs / sizeof *longs; k++)
            if (!strcmp(argv[i], longs[k].key)) {
                *longs[k].value = atol(value);
                break;
            }
        if (k < sizeof longs / sizeof *longs)
            continue;
        if (!strcmp(argv[i], "dir")) dir_path = value;
        else if (!strcmp(argv[i], "name")) name_format = value;
        else if (!strcmp(argv[i], "bytes")) file_bytes = strtoull(value, 0, 10);
        else if (!strcmp(argv[i], "io")) io_bytes = strtoull(value, 0, 10);
        else if (!strcmp(argv[i], "seed")) seed = strtoull(value, 0, 10);
        else die("unknown option: %s", argv[i]);
    }
    if (client_count < 1 || client_count > CLIENTS_MAX || io_bytes < 1 || io_bytes > IO_MAX
        || files_at_once < 1 || window < 1 || file_count < 1)
        die("an option is out of range");
}

static void item_name(long item, char *name, size_t size)
{
    snprintf(name, size, name_format, item);
}

/* -- contents ------------------------------------------------------------------------------ */

static uint64_t contents_key(long item)
{
    char name[256];
    item_name(item, name, sizeof name);
    uint64_t key = 0xcbf29ce484222325u ^ seed;
    for (const char *c = name; *c; c++)
        key = (key ^ (unsigned char)*c) * 0x100000001b3u;
    return key;
}

static uint64_t contents_word(uint64_t key, uint64_t offset)
{
    uint64_t x = key ^ (offset * 0x9e3779b97f4a7c15u);
    return x ^ x >> 29;
}

static void contents_fill(uint64_t key, uint64_t offset, unsigned char *data, size_t count)
{
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word = contents_word(key, offset + i);
        memcpy(data + i, &word, 8);
    }
    if (i < count) {
        uint64_t word = contents_word(key, offset + i);
        memcpy(data + i, &word, count - i);
    }
}

static int contents_equal(
    uint64_t key, uint64_t offset, const unsigned char *data, size_t count, long how)
{
    uint64_t difference = 0, word;
    size_t whole = how ? count & ~(size_t)7 : 0;
    for (size_t i = 0; i < whole; i += how >= 2 ? 8 : 4096) {
        memcpy(&word, data + i, 8);
        difference |= word ^ contents_word(key, offset + i);
    }
    if (how >= 2 && whole < count) {
        word = contents_word(key, offset + whole);
        difference |= (uint64_t)memcmp(data + whole, &word, count - whole);
    }
    return !difference;
}

static int run_local(int checking, const char *directory)
{
    unsigned char *data = malloc(IO_MAX);
    long bad = 0;
    for (long item = first_item; item < first_item + file_count; item++) {
        char name[256], path[4096];
        item_name(item, name, sizeof name);
        snprintf(path, sizeof path, "%s/%s", directory, name);
        int fd = open(path, checking ? O_RDONLY : O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd < 0 && !checking)
            die("%s: %s", path, strerror(errno));
        uint64_t key = contents_key(item), offset = 0;
        int good = fd >= 0;
        while (good && offset < file_bytes) {
            size_t count = file_bytes - offset < IO_MAX ? file_bytes - offset : IO_MAX;
            if (!checking)
                contents_fill(key, offset, data, count);
            ssize_t done = checking ? read(fd, data, count) : write(fd, data, count);
            if (done <= 0 && !checking)
                die("%s: %s", path, strerror(errno));
            good = done > 0 && (!checking || contents_equal(key, offset, data, (size_t)done, 2));
            offset += done > 0 ? (uint64_t)done : 0;
        }
        if (good && checking && read(fd, data, 1) != 0)
            good = 0;
        if (fd >= 0)
            close(fd);
        if (!good && !bad++)
            fprintf(stderr, "%s differs near byte %llu\n", path, (unsigned long long)offset);
    }
    printf("{\"files\": %ld, \"different\": %ld}\n", file_count, bad);
    return bad != 0;
}

/* -- XDR and RPC --------------------------------------------------------------------------- */

struct buffer { unsigned char *data; size_t begin, end, capacity; };

static unsigned char *reserve(struct buffer *b, size_t count)
{
    if (b->begin == b->end)
        b->begin = b->end = 0;
    if (b->end + count > b->capacity) {
        memmove(b->data, b->data + b->begin, b->end - b->begin);
        b->end -= b->begin;
        b->begin = 0;
        if (b->end + count > b->capacity) {
            b->capacity = (b->end + count) * 2;
            if (!(b->data = realloc(b->data, b->capacity)))
                die("out of memory");
        }
    }
    return b->data + b->end;
}

static void put32(struct buffer *b, uint32_t v)
{
    v = htonl(v);
    memcpy(reserve(b, 4), &v, 4);
    b->end += 4;
}

static void put64(struct buffer *b, uint64_t v)
{
    put32(b, (uint32_t)(v >> 32));
    put32(b, (uint32_t)v);
}

static void put_opaque(struct buffer *b, const void *data, size_t count)
{
    put32(b, (uint32_t)count);
    size_t padded = (count + 3) & ~(size_t)3;
    unsigned char *at = reserve(b, padded);
    memset(at + count, 0, padded - count);
    memcpy(at, data, count);
    b->end += padded;
}

struct reader { const unsigned char *at, *end; };

static uint32_t get32(struct reader *r)
{
    uint32_t v;
    if (r->end - r->at < 4)
        die("a reply is too short");
    memcpy(&v, r->at, 4);
    r->at += 4;
    return ntohl(v);
}

static uint64_t get64(struct reader *r)
{
    uint64_t high = get32(r);
    return high << 32 | get32(r);
}

static const unsigned char *get_bytes(struct reader *r, size_t count)
{
    const unsigned char *at = r->at;
    size_t padded = (count + 3) & ~(size_t)3;
    if ((size_t)(r->end - r->at) < padded)
        die("a reply is too short");
    r->at += padded;
    return at;
}

struct handle { uint32_t count; unsigned char bytes[HANDLE_MAX]; };

static void get_handle(struct reader *r, struct handle *h)
{
    h->count = get32(r);
    if (h->count > HANDLE_MAX)
        die("a handle is too long");
    memcpy(h->bytes, get_bytes(r, h->count), h->count);
}

static void skip_attributes(struct reader *r) { if (get32(r)) get_bytes(r, 84); }

static void skip_wcc(struct reader *r)
{
    if (get32(r))
        get_bytes(r, 24);
    skip_attributes(r);
}

static size_t begin_call(struct buffer *b, uint32_t xid, uint32_t program, uint32_t procedure)
{
    size_t mark = (reserve(b, 512), b->end - b->begin);
    uint32_t words[] = {0, xid, 0, 2, program, 3, procedure, 1, 24, 0, 4};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        put32(b, words[i]);
    memcpy(reserve(b, 4), "load", 4);
    b->end += 4;
    for (int i = 0; i < 3 + 2; i++) /* uid, gid, no groups; AUTH_NONE verifier */
        put32(b, 0);
    return mark;
}

static void end_call(struct buffer *b, size_t mark)
{
    uint32_t length = htonl(0x80000000u | (uint32_t)(b->end - b->begin - mark - 4));
    memcpy(b->data + b->begin + mark, &length, 4);
}

/* Past the RPC header of a reply; dies unless the call was accepted and executed. */
static struct reader open_reply(const unsigned char *data, size_t count, uint32_t *xid)
{
    struct reader r = {data, data + count};
    *xid = get32(&r);
    if (get32(&r) != 1 || get32(&r) != 0)
        die("an RPC was rejected");
    get32(&r);
    get_bytes(&r, get32(&r));
    uint32_t accepted = get32(&r);
    if (accepted)
        die("an RPC failed: accept_stat %u", accepted);
    return r;
}

/* -- clients, files in progress, calls in flight --------------------------------------------- */

struct client;

struct task {
    struct client *client;
    long item;
    uint64_t key;
    struct handle handle;
    uint64_t next_offset, done_bytes, cookie;
    unsigned char verifier[8], cookie_verifier[8];
    int in_flight, has_verifier, failed, active;
    long entries;
};

struct call {
    uint32_t xid;
    int procedure;
    struct task *task;
    uint64_t offset;
    size_t count;
    double sent_s, retry_at_s;
};

struct client {
    int fd;
    struct buffer out, in;
    struct task *tasks;
    struct call *calls;
    int call_max;
    long begin_item, next_item, end_item, stride, rounds_left;
};

static struct client clients[CLIENTS_MAX];
static struct handle directory_handle, *handles;
static int fetching_handles;
static const char *operation;
static long active_tasks, ops, jukebox_count, errors, wrong, entries_total;
static uint32_t error_status, next_xid = 1;
static uint64_t bytes_total;
static float *latencies_us;
static size_t latency_count, latency_capacity;

static int is(const char *name) { return !strcmp(operation, name); }

static int connect_to(const char *host, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        die("not an IPv4 address: %s", host);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connecting to %s:%d: %s", host, port, strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void receive_all(int fd, void *data, size_t count)
{
    for (ssize_t n; count; data = (char *)data + n, count -= (size_t)n)
        if ((n = recv(fd, data, count, 0)) <= 0)
            die("the server closed the connection");
}

/* One call and its reply, before the clock starts. */
static struct reader call_now(int fd, struct buffer *b, size_t mark)
{
    static unsigned char reply[1 << 16];
    uint32_t header, xid;
    end_call(b, mark);
    if (send(fd, b->data + b->begin, b->end - b->begin, 0) != (ssize_t)(b->end - b->begin))
        die("send: %s", strerror(errno));
    b->begin = b->end = 0;
    receive_all(fd, &header, 4);
    size_t count = ntohl(header) & 0x7fffffff;
    if (count > sizeof reply)
        die("a reply is too long");
    receive_all(fd, reply, count);
    return open_reply(reply, count, &xid);
}

static void resolve_directory(const char *host, int mount_port, const char *export_path, int nfs)
{
    struct buffer b = {0};
    int fd = connect_to(host, mount_port);
    size_t mark = begin_call(&b, next_xid++, MOUNT, MNT);
    put_opaque(&b, export_path, strlen(export_path));
    struct reader r = call_now(fd, &b, mark);
    uint32_t status = get32(&r);
    if (status)
        die("MOUNT %s: status %u", export_path, status);
    get_handle(&r, &directory_handle);
    close(fd);
    char *path = strdup(dir_path), *rest = path, *name;
    while ((name = strsep(&rest, "/"))) {
        if (!*name)
            continue;
        do {
            mark = begin_call(&b, next_xid++, NFS, LOOKUP);
            put_opaque(&b, directory_handle.bytes, directory_handle.count);
            put_opaque(&b, name, strlen(name));
            r = call_now(nfs, &b, mark);
            status = get32(&r);
        } while (status == NFS3ERR_JUKEBOX && !usleep(JUKEBOX_RETRY_MS * 1000));
        if (status)
            die("LOOKUP %s of %s: status %u", name, dir_path, status);
        get_handle(&r, &directory_handle);
    }
    free(path);
    free(b.data);
}

static void send_call(struct call *c)
{
    struct task *t = c->task;
    struct buffer *b = &t->client->out;
    char name[256];
    c->xid = next_xid++;
    c->sent_s = now_s();
    c->retry_at_s = 0;
    size_t mark = begin_call(b, c->xid, NFS, (uint32_t)c->procedure);
    if (c->procedure == LOOKUP || c->procedure == CREATE || c->procedure == REMOVE) {
        put_opaque(b, directory_handle.bytes, directory_handle.count);
        item_name(t->item, name, sizeof name);
        put_opaque(b, name, strlen(name));
    } else
        put_opaque(b, t->handle.bytes, t->handle.count);
    switch (c->procedure) {
    case READ:
        put64(b, c->offset);
        put32(b, (uint32_t)c->count);
        break;
    case WRITE:
        put64(b, c->offset);
        put32(b, (uint32_t)c->count);
        put32(b, 0); /* UNSTABLE */
        put32(b, (uint32_t)c->count);
        reserve(b, c->count + 3);
        contents_fill(t->key, c->offset, b->data + b->end, c->count);
        memset(b->data + b->end + c->count, 0, 3);
        b->end += (c->count + 3) & ~(size_t)3;
        break;
    case CREATE: /* UNCHECKED, mode 0644, size 0 */
        put32(b, 0);
        put32(b, 1);
        put32(b, 0644);
        put32(b, 0);
        put32(b, 0);
        put32(b, 1);
        put64(b, 0);
        put32(b, 0);
        put32(b, 0);
        break;
    case COMMIT:
        put64(b, 0);
        put32(b, 0);
        break;
    case READDIRPLUS:
        put64(b, t->cookie);
        memcpy(reserve(b, 8), t->cookie_verifier, 8);
        b->end += 8;
        put32(b, 32768);
        put32(b, 65536);
        break;
    }
    end_call(b, mark);
}

static void start_call(struct task *t, int procedure, uint64_t offset, size_t count)
{
    struct client *client = t->client;
    for (int i = 0; i < client->call_max; i++)
        if (!client->calls[i].procedure) {
            client->calls[i] = (struct call){
                .procedure = procedure, .task = t, .offset = offset, .count = count};
            t->in_flight++;
            send_call(&client->calls[i]);
            return;
        }
    die("more calls in flight than planned");
}

static void start_task(struct task *t)
{
    struct client *c = t->client;
    if (c->next_item >= c->end_item && c->rounds_left > 0) {
        c->rounds_left--;
        c->next_item = c->begin_item;
    }
    if (c->next_item >= c->end_item)
        return;
    struct task fresh = {.client = c, .item = c->next_item, .active = 1};
    *t = fresh;
    c->next_item += c->stride;
    active_tasks++;
    if (is("read") || is("write")) {
        t->key = contents_key(t->item);
        start_call(t, is("read") ? LOOKUP : CREATE, 0, 0);
    } else if (is("getattr") && !fetching_handles) {
        t->handle = handles[t->item - first_item];
        start_call(t, GETATTR, 0, 0);
    } else if (is("readdirplus")) {
        t->handle = directory_handle;
        start_call(t, READDIRPLUS, 0, 0);
    } else
        start_call(t, is("remove") ? REMOVE : LOOKUP, 0, 0);
}

static void fill_window(struct task *t, int procedure)
{
    while (!t->failed && t->in_flight < window && t->next_offset < file_bytes) {
        size_t count = file_bytes - t->next_offset < io_bytes ? file_bytes - t->next_offset
                                                               : io_bytes;
        uint64_t offset = t->next_offset;
        t->next_offset += count;
        start_call(t, procedure, offset, count);
    }
}

static void note_verifier(struct task *t, const unsigned char *verifier)
{
    if (t->has_verifier && memcmp(t->verifier, verifier, 8))
        wrong++;
    memcpy(t->verifier, verifier, 8);
    t->has_verifier = 1;
}

static void finish_task(struct task *t)
{
    if (!t->failed && (is("read") || is("write")) && t->done_bytes != file_bytes)
        wrong++;
    if (is("readdirplus"))
        entries_total += t->entries;
    t->active = 0;
    active_tasks--;
    start_task(t);
}

static void step(struct call *done, struct reader *r)
{
    struct task *t = done->task;
    int procedure = done->procedure;
    uint64_t offset = done->offset;
    size_t count = done->count;
    uint32_t status = get32(r);
    if (status == NFS3ERR_JUKEBOX) {
        jukebox_count++;
        done->retry_at_s = now_s() + JUKEBOX_RETRY_MS * 1e-3;
        return;
    }
    if (latency_count == latency_capacity) {
        latency_capacity = latency_capacity ? latency_capacity * 2 : 1 << 16;
        latencies_us = realloc(latencies_us, latency_capacity * sizeof *latencies_us);
    }
    latencies_us[latency_count++] = (float)((now_s() - done->sent_s) * 1e6);
    done->procedure = 0;
    t->in_flight--;
    ops++;
    if (status) {
        errors++;
        error_status = status;
        t->failed = 1;
        if (!t->in_flight)
            finish_task(t);
        return;
    }
    switch (procedure) {
    case LOOKUP:
        get_handle(r, &t->handle);
        if (fetching_handles)
            handles[t->item - first_item] = t->handle;
        if (is("read"))
            fill_window(t, READ);
        break;
    case CREATE:
        if (!get32(r))
            die("CREATE answered without a handle");
        get_handle(r, &t->handle);
        fill_window(t, WRITE);
        if (!file_bytes)
            start_call(t, COMMIT, 0, 0);
        break;
    case READ: {
        skip_attributes(r);
        uint32_t got = get32(r);
        get32(r);
        const unsigned char *data = get_bytes(r, get32(r));
        if (got > count || !got || !contents_equal(t->key, offset, data, got, verify))
            wrong++, t->failed = 1;
        else if (got < count)
            start_call(t, READ, offset + got, count - got);
        t->done_bytes += got;
        bytes_total += got;
        fill_window(t, READ);
        break;
    }
    case WRITE: {
        skip_wcc(r);
        uint32_t put = get32(r);
        get32(r);
        note_verifier(t, get_bytes(r, 8));
        if (put > count || !put)
            wrong++, t->failed = 1;
        else if (put < count)
            start_call(t, WRITE, offset + put, count - put);
        t->done_bytes += put;
        bytes_total += put;
        fill_window(t, WRITE);
        if (!t->in_flight && !t->failed)
            start_call(t, COMMIT, 0, 0);
        break;
    }
    case COMMIT:
        skip_wcc(r);
        note_verifier(t, get_bytes(r, 8));
        break;
    case READDIRPLUS:
        skip_attributes(r);
        memcpy(t->cookie_verifier, get_bytes(r, 8), 8);
        while (get32(r)) {
            get64(r);
            uint32_t length = get32(r);
            const unsigned char *name = get_bytes(r, length);
            t->entries += !((length == 1 && name[0] == '.')
                            || (length == 2 && name[0] == '.' && name[1] == '.'));
            t->cookie = get64(r);
            skip_attributes(r);
            if (get32(r))
                get_bytes(r, get32(r));
        }
        if (!get32(r))
            start_call(t, READDIRPLUS, 0, 0);
        break;
    }
    if (!t->in_flight)
        finish_task(t);
}

/* -- the loop ------------------------------------------------------------------------------ */

static void take_replies(struct client *c)
{
    for (;;) {
        size_t have = c->in.end - c->in.begin, need = 4;
        if (have >= 4) {
            uint32_t header;
            memcpy(&header, c->in.data + c->in.begin, 4);
            header = ntohl(header);
            if (!(header >> 31))
                die("a reply in several fragments");
            need = 4 + (header & 0x7fffffff);
        }
        if (have >= need && need > 4) {
            uint32_t xid;
            struct reader r = open_reply(c->in.data + c->in.begin + 4, need - 4, &xid);
            c->in.begin += need;
            int i = 0;
            while (i < c->call_max && (c->calls[i].xid != xid || !c->calls[i].procedure))
                i++;
            if (i == c->call_max)
                die("a reply to no call of ours");
            step(&c->calls[i], &r);
            continue;
        }
        size_t room = need > have + 65536 ? need - have : 65536;
        ssize_t n = recv(c->fd, reserve(&c->in, room), room, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0)
            die("the server closed the connection during %s", operation);
        c->in.end += (size_t)n;
        if ((size_t)n < room && c->in.end - c->in.begin < need)
            return;
    }
}

static void send_out(struct client *c)
{
    while (c->out.begin < c->out.end) {
        ssize_t n = send(c->fd, c->out.data + c->out.begin, c->out.end - c->out.begin,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0)
            die("the server closed the connection during %s", operation);
        c->out.begin += (size_t)n;
    }
}

static void send_retries(double now)
{
    for (long k = 0; k < client_count; k++)
        for (int i = 0; i < clients[k].call_max; i++) {
            struct call *c = &clients[k].calls[i];
            if (c->procedure && c->retry_at_s && c->retry_at_s <= now)
                send_call(c);
        }
}

static void run(void)
{
    struct pollfd polled[CLIENTS_MAX];
    double answered_s = now_s(), told_s = answered_s;
    for (long k = 0; k < client_count; k++)
        for (long i = 0; i < files_at_once; i++)
            start_task(&clients[k].tasks[i]);
    while (active_tasks) {
        for (long k = 0; k < client_count; k++) {
            send_out(&clients[k]);
            short events = clients[k].out.begin < clients[k].out.end ? POLLIN | POLLOUT : POLLIN;
            polled[k] = (struct pollfd){.fd = clients[k].fd, .events = events};
        }
        int ready = poll(polled, (nfds_t)client_count, 100);
        double now = now_s();
        if (jukebox_count)
            send_retries(now);
        if (ready > 0)
            answered_s = now;
        else if (now - answered_s > STALL_LIMIT_S)
            die("no answer for %d s during %s", STALL_LIMIT_S, operation);
        if (tell_progress && now - told_s >= 0.1) {
            printf("{\"progress\": %llu}\n", (unsigned long long)bytes_total);
            fflush(stdout);
            told_s = now;
        }
        for (long k = 0; k < client_count; k++)
            if (polled[k].revents & (POLLIN | POLLERR | POLLHUP))
                take_replies(&clients[k]);
    }
}

static void plan(long rounds)
{
    for (long k = 0; k < client_count; k++) {
        struct client *c = &clients[k];
        int whole = each_client || is("readdirplus");
        c->begin_item = c->next_item = first_item + (whole ? 0 : k);
        c->end_item = first_item + (is("readdirplus") ? 1 : file_count);
        c->stride = whole ? 1 : client_count;
        c->rounds_left = rounds - 1;
    }
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double percentile(double share)
{
    return latency_count ? latencies_us[(size_t)(share * (double)(latency_count - 1))] : 0;
}

int main(int argc, char **argv)
{
    if (argc >= 3 && (!strcmp(argv[1], "fill") || !strcmp(argv[1], "check"))) {
        parse_options(argc - 3, argv + 3);
        return run_local(!strcmp(argv[1], "check"), argv[2]);
    }
    if (argc < 6)
        die("usage: load HOST NFS_PORT MOUNT_PORT EXPORT OPERATION [key=value ...]");
    operation = argv[5];
    parse_options(argc - 6, argv + 6);
    for (long k = 0; k < client_count; k++) {
        struct client *c = &clients[k];
        c->fd = connect_to(argv[1], atoi(argv[2]));
        c->tasks = calloc((size_t)files_at_once, sizeof *c->tasks);
        c->call_max = (int)(files_at_once * window);
        c->calls = calloc((size_t)c->call_max, sizeof *c->calls);
        for (long i = 0; i < files_at_once; i++)
            c->tasks[i].client = c;
    }
    resolve_directory(argv[1], atoi(argv[3]), argv[4], clients[0].fd);
    if (is("getattr")) {
        handles = calloc((size_t)file_count, sizeof *handles);
        fetching_handles = 1;
        plan(1);
        run();
        fetching_handles = 0;
    }
    plan(repeat_count);
    ops = 0;
    latency_count = 0;
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    double begin_s = now_s();
    run();
    double elapsed_s = now_s() - begin_s;
    getrusage(RUSAGE_SELF, &after);
    qsort(latencies_us, latency_count, sizeof *latencies_us, compare);
    double cpu_s = (double)(after.ru_utime.tv_sec - before.ru_utime.tv_sec
                            + after.ru_stime.tv_sec - before.ru_stime.tv_sec)
                   + 1e-6 * (double)(after.ru_utime.tv_usec - before.ru_utime.tv_usec
                                     + after.ru_stime.tv_usec - before.ru_stime.tv_usec);
    printf("{\"seconds\": %.6f, \"operations\": %ld, \"bytes\": %llu, \"entries\": %ld, "
           "\"errors\": %ld, \"error_status\": %u, \"wrong\": %ld, \"jukebox\": %ld, "
           "\"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"cpu_s\": %.3f}\n",
           elapsed_s, ops, (unsigned long long)bytes_total, entries_total, errors, error_status,
           wrong, jukebox_count, percentile(0.5), percentile(0.99), percentile(1), cpu_s);
    return errors || wrong ? 3 : 0;
}
