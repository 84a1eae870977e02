package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vdisk/vdisk/cow"
)

// ErrMissing is the error that a program is not installed.
var ErrMissing = errors.New("a program is missing")

// errTruncated is the error that an image is shorter than it says.
var errTruncated = errors.New("the image is incomplete")

// Options control how an image is read.
type Options struct {
	Format Format
	// Backing lets an image refer to other files: a backing file, a parent, a file with its data. Their content becomes
	// part of the disk. So an image that is not trusted could make this process read any file.
	Backing bool
}

// debian names the packages of the programs that this package runs.
var debian = map[string]string{"qemu-img": "qemu-utils", "xz": "xz-utils"}

// command returns a command that ends with ctx.
func command(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	path, err := exec.LookPath(program)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("%w: %s; Debian and its relatives have it in the package %s", ErrMissing, program, debian[program])
	}
	if err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, path, args...)
	c.WaitDelay = time.Second
	c.Env = append(os.Environ(), "LC_ALL=C")
	return c, nil
}

// complaint is what a program wrote to its standard error, as far as it matters.
type complaint struct{ text []byte }

const (
	maxComplaint = 8 << 10
	maxLines     = 3
)

// nodeName is how qemu-img names an image that node describes.
var nodeName = regexp.MustCompile(`'json:\{[^']*"filename":"([^"']*)"[^']*'`)

func (c *complaint) Write(p []byte) (int, error) {
	c.text = append(c.text, p[:min(len(p), maxComplaint-len(c.text))]...)
	return len(p), nil
}

// explain adds what the program wrote to the error that it ended with.
func (c *complaint) explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	lines := strings.FieldsFunc(string(c.text), func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) == 0 {
		return err
	}
	if len(lines) > maxLines {
		lines = append(lines[:maxLines], "and more")
	}
	f := failure{text: nodeName.ReplaceAllString(strings.Join(lines, "; "), "'$1'")}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		if strings.Contains(strings.ToLower(f.text), full.Error()) {
			f.kind = full
		}
	}
	return f
}

// failure is an error of a program, in the program's words. It matches the error of a full disk if the words say that.
type failure struct {
	text string
	kind error // nil: none that is known
}

func (f failure) Error() string { return f.text }
func (f failure) Unwrap() error { return f.kind }

// qemuImg runs qemu-img to its end and returns its output and exit code.
func qemuImg(ctx context.Context, args ...string) (out []byte, code int, err error) {
	c, err := command(ctx, "qemu-img", args...)
	if err != nil {
		return nil, 0, err
	}
	var buf bytes.Buffer
	var why complaint
	c.Stdout, c.Stderr = &buf, &why
	err = c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	return buf.Bytes(), code, why.explain(ctx, err)
}

// node describes an image to qemu, without any guessing: its format, its file, and that it has no backing file.
func node(f *os.File, o Options) (string, error) {
	path, err := filepath.Abs(f.Name())
	if err != nil {
		return "", err
	}
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	protocol := "file"
	if fi.Mode()&os.ModeDevice != 0 {
		protocol = "host_device"
	}
	n := map[string]any{"driver": o.Format.Name, "file": map[string]string{"driver": protocol, "filename": path}}
	if !o.Backing {
		n["backing"] = nil
	}
	text, err := json.Marshal(n)
	return "json:" + string(text), err
}

// inspect returns the size of the disk in an image, and checks what can be checked before it is read.
func inspect(ctx context.Context, f *os.File, o Options) (size int64, err error) {
	refs, err := references(f, o.Format.Name)
	if err != nil {
		return 0, err
	}
	if len(refs) > 0 && !o.Backing {
		return 0, fmt.Errorf("the image refers to %s, whose content would become part of the volume: %w: "+
			"if you trust the image, --backing permits that", strings.Join(refs, " and to "), cow.ErrInvalid)
	}
	name, err := node(f, o)
	if err != nil {
		return 0, err
	}
	out, _, err := qemuImg(ctx, "info", "-f", o.Format.Name, "--output=json", name)
	if err != nil {
		return 0, err
	}
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return 0, fmt.Errorf("the output of qemu-img info: %w", err)
	}
	return info.Size, sound(ctx, f, name, o.Format.Name, len(refs) > 0)
}

// Exit codes of qemu-img check.
const (
	checkLeaks       = 3
	checkUnsupported = 63
)

// sound checks that an image is whole.
func sound(ctx context.Context, f *os.File, name, format string, refers bool) error {
	_, code, err := qemuImg(ctx, "check", "-q", "-f", format, name)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil && code != checkLeaks && code != checkUnsupported {
		return fmt.Errorf("the image is damaged: %w", err)
	}
	if refers { // the map does not say which file an offset belongs to
		return nil
	}
	ends, err := mapped(ctx, f, name, format)
	if err != nil {
		return err
	}
	for path, end := range ends {
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		size := fi.Size()
		if path == f.Name() { // which may be a block device
			size, err = f.Seek(0, io.SeekEnd)
		}
		if err == nil && end > size {
			err = fmt.Errorf("%w: %s has %d bytes, and there is data up to %d", errTruncated, path, size, end)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mapped returns, for each file of an image, where the data ends that the image maps. qemu takes what lies behind the end
// of a file for zeros, and its check does not look for that in all formats.
func mapped(ctx context.Context, f *os.File, name, format string) (ends map[string]int64, err error) {
	first := make([]byte, HeadSize)
	if _, err := f.ReadAt(first, 0); err != nil && err != io.EOF {
		return nil, err
	}
	// The text has the names of files. But it cannot be had of images with compressed data.
	several := format == "vmdk" && isDescriptor(first)
	c, err := command(ctx, "qemu-img", "map", "-f", format, "--output="+map[bool]string{true: "human", false: "json"}[several], name)
	if err != nil {
		return nil, err
	}
	var why complaint
	c.Stderr = &why
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	if several {
		ends, err = mappedText(out)
	} else {
		var end int64
		end, err = mappedJSON(out)
		ends = map[string]int64{f.Name(): end}
	}
	_, _ = io.Copy(io.Discard, out) // so that it is not stopped by a full pipe
	if werr := why.explain(ctx, c.Wait()); werr != nil {
		return nil, werr
	}
	if err != nil {
		err = fmt.Errorf("the output of qemu-img map: %w", err)
	}
	return ends, err
}

// mappedJSON returns where the mapped data ends, by the JSON of qemu-img map.
func mappedJSON(r io.Reader) (end int64, err error) {
	d := json.NewDecoder(r)
	if _, err := d.Token(); err != nil {
		return 0, err
	}
	for d.More() {
		var e struct {
			Length int64  `json:"length"`
			Offset *int64 `json:"offset"`
		}
		if err := d.Decode(&e); err != nil {
			return 0, err
		}
		if e.Offset != nil {
			end = max(end, *e.Offset+e.Length)
		}
	}
	return end, nil
}

// mappedText returns where the mapped data ends in each file, by the text of qemu-img map.
func mappedText(r io.Reader) (map[string]int64, error) {
	ends := make(map[string]int64)
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "Offset") {
			continue
		}
		var numbers [3]int64 // in the disk, length, in the file
		path := lines.Text() // the rest, which may have blanks
		for i := range numbers {
			text, rest, _ := strings.Cut(path, " ")
			n, err := strconv.ParseInt(text, 0, 64)
			if err != nil || n < 0 {
				return nil, fmt.Errorf("the line %q", lines.Text())
			}
			numbers[i], path = n, strings.TrimLeft(rest, " ")
		}
		ends[path] = max(ends[path], numbers[2]+numbers[1])
	}
	return ends, lines.Err()
}
