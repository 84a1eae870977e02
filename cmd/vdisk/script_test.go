package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/testpki"
	"github.com/vdisk/vdisk/metadata"
)

func TestMain(m *testing.M) {
	// The tests may run below nohup; the commands that they start must not ignore the signal for that.
	if strings.HasSuffix(os.Args[0], ".test") && signal.Ignored(syscall.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	testscript.Main(m, map[string]func(){
		"vdisk":        func() { os.Exit(run(os.Args)) },
		"vdisk-broken": func() { os.Exit(runBroken()) },
	})
}

// taken keeps a hand-over: its files must not be closed by the garbage collector, as run takes the same descriptors.
var taken *owner.Handover

// runBroken is a vdisk that cannot take over, and gives the store back.
func runBroken() int {
	text := os.Getenv("VDISK_HANDOVER")
	if h := owner.TakeHandover(); h != nil {
		taken = h
		if h.Failed == "" {
			fmt.Fprintln(os.Stderr, h.Return("broken", errors.New("this one is broken")))
			return 1
		}
		os.Setenv("VDISK_HANDOVER", text) // the program that it was given back to has the same file
	}
	return run(os.Args)
}

// TestScripts runs the scripts of testdata/script, each in a folder of its own with a store at $VDISK_STORE.
func TestScripts(t *testing.T) {
	repo, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("..", "..", "testdata", "script"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Deadline:            time.Now().Add(4 * time.Minute),
		Setup: func(e *testscript.Env) error {
			e.Setenv("VDISK_STORE", filepath.Join(e.WorkDir, "store"))
			e.Setenv("REPO", repo)
			e.Setenv("VDISK_FULL_SIZE", cmp.Or(os.Getenv("VDISK_FULL_SIZE"), "192M")) // fullnbd.txt
			e.Setenv("FORMATS", filepath.Join(repo, "testdata", "format"))
			e.Setenv("GORACE", "atexit_sleep_ms=20") // the race detector's default is a second for each process
			return nil
		},
		Condition: condition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"doc":      cmdDoc,
			"exits":    cmdExits,
			"tlsfiles": cmdTLSFiles,
			"waitfor":  cmdWaitFor,
			"json":     cmdJSON,
			"keys":     cmdKeys,
			"image":    cmdImage,
			"put":      cmdPut,
			"rbdapply": cmdRBDApply,
			"poke":     cmdPoke,
			"badleaf":  cmdBadLeaf,
			"sparse":   cmdSparse,
			"retry":    cmdRetry,
		},
	})
}

func condition(name string) (bool, error) {
	switch name {
	case "root":
		return os.Getuid() == 0, nil
	case "ublk":
		_, err := os.Stat("/dev/ublk-control")
		return err == nil, nil
	}
	return false, fmt.Errorf("unknown condition %q", name)
}

// cmdExits runs a program and checks its exit code: exits CODE PROGRAM ARGUMENT...
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGUMENT...")
	}
	got := exitCodeOf(ts, ts.Exec(args[1], args[2:]...))
	if fmt.Sprint(got) != args[0] {
		ts.Fatalf("%v: exit code %d, want %s", args[1:], got, args[0])
	}
}

// cmdTLSFiles makes folders with certificates: server and client, of one authority; foreign, of another one, for a client
// that trusts the server; none, for a client without a certificate; and gone, for a client that the revocation list
// in the file revoked.pem names.
func cmdTLSFiles(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: tlsfiles")
	}
	ours, err := testpki.New("ours")
	ts.Check(err)
	theirs, err := testpki.New("theirs")
	ts.Check(err)
	ts.Check(ours.Client(ts.MkAbs("gone")))
	ts.Check(ours.Revoke(ts.MkAbs("revoked.pem"), nil, ts.MkAbs("gone")))
	foreign := ts.MkAbs("foreign")
	ts.Check(errors.Join(ours.Server(ts.MkAbs("server")), ours.Client(ts.MkAbs("client")), ours.Trust(ts.MkAbs("none"))))
	ts.Check(errors.Join(theirs.Client(foreign), ours.Trust(foreign)))
}

func exitCodeOf(ts *testscript.TestScript, err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal())
		}
		return exit.ExitCode()
	}
	ts.Fatalf("running: %v", err)
	return -1
}

// patience is how long a script waits for an event.
const patience = 20 * time.Second

// cmdWaitFor waits until somebody listens on a socket, or, with !, until there is no such file.
func cmdWaitFor(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] waitfor FILE")
	}
	path := ts.MkAbs(args[0])
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		_, err := os.Lstat(path)
		if neg && errors.Is(err, os.ErrNotExist) {
			return
		}
		if !neg && err == nil {
			if c, err := net.Dial("unix", path); err == nil {
				c.Close()
				return
			}
		}
	}
	ts.Fatalf("waited in vain for %s", path)
}

// cmdRetry runs a program until it exits with a code: retry CODE PROGRAM ARGUMENT...
func cmdRetry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: retry CODE PROGRAM ARGUMENT...")
	}
	var out []byte
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		c := exec.Command("env", args[1:]...) // which looks in the script's PATH
		c.Dir = ts.MkAbs(".")
		c.Env = append(os.Environ(), "PATH="+ts.Getenv("PATH"), "VDISK_STORE="+ts.Getenv("VDISK_STORE"), "GORACE="+ts.Getenv("GORACE"),
			"WORK="+ts.Getenv("WORK"))
		var err error
		out, err = c.CombinedOutput()
		if fmt.Sprint(exitCodeOf(ts, err)) == args[0] {
			return
		}
	}
	ts.Fatalf("%v never exits with %s: %s", args[1:], args[0], out)
}

// value finds a place in the JSON on standard output: names and numbers, separated by dots; a dot for all.
func value(ts *testscript.TestScript, stream, place string) any {
	var v any
	if err := json.Unmarshal([]byte(ts.ReadFile(stream)), &v); err != nil {
		ts.Fatalf("%s is no JSON: %v", stream, err)
	}
	for _, name := range strings.FieldsFunc(place, func(r rune) bool { return r == '.' }) {
		switch in := v.(type) {
		case map[string]any:
			sub, ok := in[name]
			if !ok {
				ts.Fatalf("%s: there is no %q", place, name)
			}
			v = sub
		case []any:
			i, err := strconv.Atoi(name)
			if err != nil || i >= len(in) {
				ts.Fatalf("%s: there is no item %q of %d", place, name, len(in))
			}
			v = in[i]
		default:
			ts.Fatalf("%s: %q is in nothing", place, name)
		}
	}
	return v
}

// cmdJSON checks a value in the JSON on standard output (or -err, on standard error): json [-err] PLACE VALUE
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	stream := "stdout"
	if len(args) > 0 && args[0] == "-err" {
		stream, args = "stderr", args[1:]
	}
	if len(args) != 2 {
		ts.Fatalf("usage: [!] json [-err] PLACE VALUE")
	}
	v := value(ts, stream, args[0])
	text := fmt.Sprint(v)
	if f, ok := v.(float64); ok {
		text = strconv.FormatFloat(f, 'f', -1, 64)
	}
	if (text == args[1]) == neg {
		ts.Fatalf("%s is %s", args[0], text)
	}
}

// cmdKeys checks all names of an object in the JSON on standard output, in the alphabet's order: keys PLACE NAME...
func cmdKeys(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: keys PLACE NAME...")
	}
	object, ok := value(ts, "stdout", args[0]).(map[string]any)
	if !ok {
		ts.Fatalf("%s is no object", args[0])
	}
	var names []string
	for name := range object {
		names = append(names, name)
	}
	slices.Sort(names)
	if !slices.Equal(names, args[1:]) {
		ts.Fatalf("%s has %q, want %q", args[0], names, args[1:])
	}
}

// cmdImage makes a sparse file with data in some places: image FILE SIZE [OFFSET:LENGTH:SEED]...
func cmdImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: image FILE SIZE [OFFSET:LENGTH:SEED]...")
	}
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	size, err := parseSize(args[1])
	ts.Check(err)
	ts.Check(f.Truncate(size))
	for _, run := range args[2:] {
		fields := strings.Split(run, ":")
		if len(fields) != 3 {
			ts.Fatalf("%q: OFFSET:LENGTH:SEED is needed", run)
		}
		off, err := parseSize(fields[0])
		ts.Check(err)
		n, err := parseSize(fields[1])
		ts.Check(err)
		_, err = f.WriteAt(noise(fields[2], int(n)), off)
		ts.Check(err)
	}
}

// noise is data that depends on a seed and does not compress.
func noise(seed string, n int) []byte {
	state := uint64(14695981039346656037) // FNV-1a, then xorshift64
	for _, c := range seed {
		state = (state ^ uint64(c)) * 1099511628211
	}
	p := make([]byte, n)
	for i := range p {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		p[i] = byte(state >> 24)
	}
	return p
}

// cmdPoke changes bytes in the middle of the largest file that matches, as a bad disk would: poke GLOB
func cmdPoke(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: poke GLOB")
	}
	names, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	var name string
	var size int64
	for _, n := range names {
		if fi, err := os.Stat(n); err == nil && fi.Size() > size {
			name, size = n, fi.Size()
		}
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	was := make([]byte, 64)
	_, err = f.ReadAt(was, size/2)
	ts.Check(err)
	for i := range was {
		was[i] ^= 0x55
	}
	_, err = f.WriteAt(was, size/2)
	ts.Check(err)
}

// cmdBadLeaf damages versions of leaves of the first branch as of its first epoch: badleaf LEAF...
func cmdBadLeaf(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: badleaf LEAF...")
	}
	table, err := metadata.Open(ts.MkAbs("store/meta.db"), metadata.Options{Timeout: time.Second})
	ts.Check(err)
	defer table.Close()
	for _, arg := range args {
		leaf, err := strconv.ParseUint(arg, 10, 32)
		ts.Check(err)
		ts.Check(table.Update(func(tx *metadata.Tx) error {
			return tx.PutLeaf(metadata.Version{Branch: 1, Leaf: uint32(leaf), Epoch: 1}, []byte("rotten"))
		}))
	}
}

// cmdSparse checks that a file takes at most so many bytes on disk: sparse FILE MOST
func cmdSparse(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: sparse FILE MOST")
	}
	most, err := parseSize(args[1])
	ts.Check(err)
	var st syscall.Stat_t
	ts.Check(syscall.Stat(ts.MkAbs(args[0]), &st))
	if st.Blocks*512 > most {
		ts.Fatalf("%s takes %d bytes", args[0], st.Blocks*512)
	}
}
