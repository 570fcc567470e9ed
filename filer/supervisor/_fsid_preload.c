/*
 * A stable f_fsid for FUSE mounts, preloaded into NFS-Ganesha.
 *
 * Ganesha puts statfs(2)'s f_fsid into every NFS handle.  For a FUSE mount the kernel derives it
 * from an anonymous device number, which differs on every node and every mount, so handles
 * would go stale.  With
 *
 *     LD_PRELOAD=_fsid_preload.so FILER_FSID=/mnt/shows=0xfc10001:0x2,/mnt/plates=0xfc10001:0x3
 *
 * statfs(2) of exactly these paths answers the two given 32 bit words instead.  The variable is
 * parsed once, at load; what cannot be parsed ends the process with a message, because handles
 * that go stale later are worse.
 *
 * Built as an extension module only to be compiled with the package; it is not importable.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>

#define VOLUMES_MAX 256

static struct volume {
	char *path;
	uint32_t fsid[2];
} volumes[VOLUMES_MAX];
static size_t volume_count;

static int (*real_statfs)(const char *, struct statfs *);
static int (*real_statfs64)(const char *, struct statfs64 *);

static void refuse(const char *entry)
{
	fprintf(stderr, "FILER_FSID: cannot use '%s'; each entry must be /path=WORD:WORD\n", entry);
	_Exit(78); /* EX_CONFIG */
}

static uint32_t parse_word(const char *text, char end, const char **next, const char *entry)
{
	char *stop;
	unsigned long word;

	errno = 0;
	word = strtoul(text, &stop, 0);
	if (errno != 0 || stop == text || *stop != end || word > UINT32_MAX)
		refuse(entry);
	*next = stop + 1;
	return (uint32_t)word;
}

__attribute__((constructor)) static void parse_environment(void)
{
	const char *variable = getenv("FILER_FSID");
	char *entries, *entry, *position;

	real_statfs = dlsym(RTLD_NEXT, "statfs");
	real_statfs64 = dlsym(RTLD_NEXT, "statfs64");
	if (variable == NULL)
		return;
	entries = strdup(variable); /* kept: the paths point into it */
	for (entry = strtok_r(entries, ",", &position); entry != NULL;
	     entry = strtok_r(NULL, ",", &position)) {
		char *equals = strrchr(entry, '=');
		struct volume *volume = &volumes[volume_count];
		const char *word;

		if (equals == NULL || entry[0] != '/' || volume_count == VOLUMES_MAX)
			refuse(entry);
		volume->fsid[0] = parse_word(equals + 1, ':', &word, entry);
		volume->fsid[1] = parse_word(word, '\0', &word, entry);
		*equals = '\0';
		volume->path = entry;
		volume_count++;
	}
}

static const struct volume *volume_of(const char *path)
{
	for (size_t i = 0; path != NULL && i < volume_count; i++)
		if (strcmp(volumes[i].path, path) == 0)
			return &volumes[i];
	return NULL;
}

int statfs(const char *path, struct statfs *result)
{
	const struct volume *volume = volume_of(path);
	int status = real_statfs(path, result);

	if (status == 0 && volume != NULL)
		memcpy(&result->f_fsid, volume->fsid, sizeof(volume->fsid));
	return status;
}

int statfs64(const char *path, struct statfs64 *result)
{
	const struct volume *volume = volume_of(path);
	int status = real_statfs64(path, result);

	if (status == 0 && volume != NULL)
		memcpy(&result->f_fsid, volume->fsid, sizeof(volume->fsid));
	return status;
}
