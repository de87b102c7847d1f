/*
 * moorage-cni, the fast path: the ordinary call to an agent that answers, in a millisecond.
 *
 *     stdin, CNI_* --> frame --> agent's socket --> reply --> stdout, exit code
 *            |                         |
 *            +---- anything else ------+--> execve moorage-cni-py, stdin rewound, same environment
 *
 * moorage-cni-py (netmodules/hook.py) lies beside this program, is complete by itself, and is the reference: what
 * is sent from here is what it would send, byte for byte. Once the agent may have the request, its id and time go
 * along as `--resume ID STARTED`, so that sending it again is known to be the same call. The frame is described in
 * netmodules/frame.py. Nothing is allocated: what does not fit the buffers below is not an ordinary call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PYTHON_HOOK "moorage-cni-py"
enum { HEADER = 8, MAX_STDIN = 1 << 20, MAX_PAYLOAD = MAX_STDIN + (1 << 16) };
enum { MAX_VARIABLES = 64, MAX_DEPTH = 64, SEND_SECONDS = 5, ANSWER_SECONDS = 55 };

static char input[MAX_STDIN + 1], request[HEADER + MAX_PAYLOAD], reply[MAX_PAYLOAD];
static size_t input_length, request_length;
static bool input_taken, request_too_long;
static const char *variables[MAX_VARIABLES];
static size_t variable_count;
static char id[33], started[24];
static char *afresh[] = {NULL, NULL}, *resumed[] = {NULL, "--resume", id, started, NULL};

static bool write_all(int file, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t written = write(file, bytes, length);
        if (written == -1 && errno != EINTR)
            return false;
        bytes += written > 0 ? written : 0;
        length -= written > 0 ? (size_t)written : 0;
    }
    return true;
}

/* Up to `length` bytes, fewer only at the end of the file; -1 if it cannot be read. */
static ssize_t read_all(int file, char *bytes, size_t length)
{
    size_t had = 0;
    while (had < length) {
        ssize_t got = read(file, bytes + had, length - had);
        if (got == 0)
            break;
        if (got == -1 && errno != EINTR)
            return -1;
        had += got > 0 ? (size_t)got : 0;
    }
    return (ssize_t)had;
}

/* Make fd 0 read as it did at the start. It is closed first: the lowest descriptor is then free, even at the limit. */
static bool give_input_back(void)
{
    if (!input_taken)
        return true;
    close(0);
    int file = memfd_create("stdin", 0);
    if (file == -1)
        file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    return file == 0 && write_all(0, input, input_length) && lseek(0, 0, SEEK_SET) == 0;
}

/* Become the Python hook; arguments[0] is filled in here. /proc/self/exe is the real path, whatever links led here. */
_Noreturn static void hand_over(char **arguments)
{
    static char path[PATH_MAX + sizeof PYTHON_HOOK];
    char *slash = readlink("/proc/self/exe", path, PATH_MAX - 1) > 0 ? strrchr(path, '/') : NULL;
    if (slash != NULL && give_input_back()) {
        memcpy(slash + 1, PYTHON_HOOK, sizeof PYTHON_HOOK);
        arguments[0] = path;
        execve(path, arguments, environ);
    }
    static const char error[] = "{\"cniVersion\": \"0.2.0\", \"code\": 5, \"msg\": \"moorage-cni cannot start "
                                PYTHON_HOOK ", which belongs beside it; install moorage again\"}";
    write_all(1, error, sizeof error - 1);
    _exit(1);
}

/* Find what concerns us in the environment. False if a name is odd or there twice, or there are too many. */
static bool find_variables(void)
{
    for (char **entry = environ; *entry != NULL; entry++) {
        if (strncmp(*entry, "CNI_", 4) != 0 && strncmp(*entry, "MOORAGE_SOCKET=", 15) != 0)
            continue;
        size_t name = strspn(*entry, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_");
        if ((*entry)[name] != '=' || variable_count == MAX_VARIABLES)
            return false;
        for (size_t i = 0; i < variable_count; i++)
            if (strncmp(variables[i], *entry, name + 1) == 0)
                return false;
        variables[variable_count++] = *entry;
    }
    return true;
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value != NULL ? value : "";
}

/* Whether the command is one we forward, with all it needs (REQUIRED in netmodules/hook.py). */
static bool is_ordinary_command(void)
{
    const char *command = variable("CNI_COMMAND");
    if (strcmp(command, "GC") == 0 || strcmp(command, "STATUS") == 0)
        return true;
    if (*variable("CNI_CONTAINERID") == '\0' || *variable("CNI_IFNAME") == '\0')
        return false;
    return strcmp(command, "DEL") == 0 ||
           ((strcmp(command, "ADD") == 0 || strcmp(command, "CHECK") == 0) && *variable("CNI_NETNS") != '\0');
}

/*
 * A scanner of JSON that is JSON beyond doubt: ASCII, no escapes, whole numbers, not deep, and "socket" at most once
 * at the top, an absolute path. What it refuses may still be JSON, and is Python's to judge.
 */
static const char *at, *end, *found;
static size_t found_length;

static bool take(char wanted)
{
    return at < end && *at == wanted && at++;
}

static void skip_blanks(void)
{
    while (take(' ') || take('\t') || take('\n') || take('\r'))
        ;
}

static bool take_string(void)
{
    if (!take('"'))
        return false;
    while (at < end && *at >= ' ' && *at <= '~' && *at != '"' && *at != '\\')
        at++;
    return take('"');
}

static bool take_word_or_number(void)
{
    static const char *const words[] = {"true", "false", "null", "0"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(end - at) >= length && memcmp(at, words[i], length) == 0)
            return at += length;
    }
    const char *first = at;
    while (at < end && *at >= '0' && *at <= '9')
        at++;
    return at > first && at - first <= 18;
}

static bool take_value(int depth)
{
    static const char key[] = "\"socket\"";
    if (at < end && *at == '"')
        return take_string();
    bool object = take('{');
    if (!object && !take('['))
        return take_word_or_number();
    char close = object ? '}' : ']';
    skip_blanks();
    if (take(close))
        return true;
    do {
        skip_blanks();
        const char *name = at;
        if (object && !take_string())
            return false;
        bool ours = depth == 0 && at - name == sizeof key - 1 && memcmp(name, key, sizeof key - 1) == 0;
        skip_blanks();
        if (object && !take(':'))
            return false;
        skip_blanks();
        const char *value = at;
        if (depth == MAX_DEPTH || !take_value(depth + 1))
            return false;
        if (ours) {
            if (found != NULL || at - value < 3 || value[0] != '"' || value[1] != '/')
                return false;
            found = value + 1;
            found_length = (size_t)(at - value) - 2;
        }
        skip_blanks();
    } while (take(','));
    return take(close);
}

/* Where the agent listens (socket_path in netmodules/hook.py). False unless that is beyond doubt. */
static bool find_socket(struct sockaddr_un *address)
{
    at = input;
    end = input + input_length;
    if (memmem(input, input_length, "\"socket\"", 8) != NULL) {
        skip_blanks();
        if (!take_value(0))
            return false;
        skip_blanks();
        if (at != end)
            return false;
    }
    if (found == NULL) {
        found = *variable("MOORAGE_SOCKET") == '/' ? variable("MOORAGE_SOCKET") : "/run/moorage/agent.sock";
        found_length = strlen(found);
    }
    if (found_length >= sizeof address->sun_path)
        return false;
    memcpy(address->sun_path, found, found_length);
    return true;
}

static void append(const char *bytes, size_t length)
{
    request_too_long |= length > sizeof request - request_length;
    if (!request_too_long) {
        memcpy(request + request_length, bytes, length);
        request_length += length;
    }
}

static void append_number(size_t number, int bytes)
{
    while (bytes-- > 0)
        append((char[]){(char)(number >> 8 * bytes)}, 1);
}

static void append_field(const char *prefix, const char *name, size_t name_length, const char *value, size_t length)
{
    append_number(strlen(prefix) + name_length, 2);
    append(prefix, strlen(prefix));
    append(name, name_length);
    append_number(length, 4);
    append(value, length);
}

static bool encode_request(void)
{
    char boot[64];
    unsigned char random[16];
    struct timespec now;
    int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t boot_length = file == -1 ? -1 : read_all(file, boot, sizeof boot);
    close(file);
    if (boot_length < 2 || boot[boot_length - 1] != '\n' || clock_gettime(CLOCK_BOOTTIME, &now) != 0 ||
        getrandom(random, sizeof random, 0) != sizeof random)
        return false;
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(id + 2 * i, 3, "%02x", random[i]);
    snprintf(started, sizeof started, "%lld", now.tv_sec * 1000000000LL + now.tv_nsec);
    append("MRG1\0\0\0\0", HEADER);
    append_field("call", "", 0, "cni", 3);
    append_field("request", "", 0, id, 32);
    append_field("boot", "", 0, boot, (size_t)boot_length - 1);
    append_field("started", "", 0, started, strlen(started));
    for (size_t i = 0; i < variable_count; i++) {
        size_t name = strcspn(variables[i], "=");
        if (variables[i][0] == 'C')
            append_field("env.", variables[i], name, variables[i] + name + 1, strlen(variables[i] + name + 1));
    }
    append_field("stdin", "", 0, input, input_length);
    size_t whole = request_length;
    request_length = 4;
    append_number(whole - HEADER, 4);
    request_length = whole;
    return !request_too_long;
}

/* `bytes` of a reply as a number, big endian. */
static size_t number_in(const char *where, int bytes)
{
    size_t number = 0;
    while (bytes-- > 0)
        number = number << 8 | (unsigned char)*where++;
    return number;
}

/* The exit code in a reply that is {exit, stdout} and no more, and where its stdout is; -1 if it is not that. */
static int decode_reply(size_t length, const char **text, size_t *text_length)
{
    if (length < 10 || memcmp(reply, "\0\4exit", 6) != 0)
        return -1;
    size_t digits = number_in(reply + 6, 4);
    if (digits < 1 || digits > 3 || length < 22 + digits || memcmp(reply + 10 + digits, "\0\6stdout", 8) != 0)
        return -1;
    *text = reply + 22 + digits;
    *text_length = length - 22 - digits;
    int code = 0;
    for (const char *digit = reply + 10; digit < reply + 10 + digits; digit++)
        code = *digit < '0' || *digit > '9' ? 1000 : code * 10 + *digit - '0';
    return code <= 255 && number_in(*text - 4, 4) == *text_length ? code : -1;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval send_timeout = {.tv_sec = SEND_SECONDS}, answer_timeout = {.tv_sec = ANSWER_SECONDS};
    char header[HEADER];
    const char *text;
    size_t length;
    int code;

    if (argc > 1)
        hand_over(argv);
    for (int file = 0; file <= 2; file++)
        if (fcntl(file, F_GETFD) == -1)
            hand_over(afresh);
    if (isatty(0) || !find_variables() || !is_ordinary_command())
        hand_over(afresh);
    ssize_t got = read_all(0, input, sizeof input);
    input_taken = true;
    input_length = got > 0 ? (size_t)got : 0;
    if (got == -1 || got > MAX_STDIN || !find_socket(&address) || !encode_request())
        hand_over(afresh);

    signal(SIGPIPE, SIG_IGN); /* Python does so too */
    int link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link == -1 || setsockopt(link, SOL_SOCKET, SO_SNDTIMEO, &send_timeout, sizeof send_timeout) != 0 ||
        setsockopt(link, SOL_SOCKET, SO_RCVTIMEO, &answer_timeout, sizeof answer_timeout) != 0 ||
        connect(link, (struct sockaddr *)&address, sizeof address) != 0)
        hand_over(afresh);
    if (!write_all(link, request, request_length) || read_all(link, header, HEADER) != HEADER ||
        memcmp(header, "MRG1", 4) != 0 || (length = number_in(header + 4, 4)) > sizeof reply ||
        read_all(link, reply, length) != (ssize_t)length || (code = decode_reply(length, &text, &length)) == -1)
        hand_over(resumed);
    close(link);
    return write_all(1, text, length) ? code : 1;
}
