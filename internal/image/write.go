package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Output is how qemu-img writes an image.
type Output struct {
	Format  Format
	Options string // options of the format, as qemu-img takes them
	// Compress compresses the data within the image.
	Compress bool
}

// severalFiles are values of the option subformat that make more than one file, and files are the options that name
// another one.
var (
	severalFiles = []string{"monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"}
	otherFiles   = []string{"backing_file", "backing_fmt", "data_file", "data_file_raw"}
)

// Check refuses options that make an image that consists of more than one file.
func (o Output) Check() error {
	for option := range strings.SplitSeq(o.Options, ",") {
		key, value, _ := strings.Cut(option, "=")
		for _, s := range severalFiles {
			if key == "subformat" && value == s {
				return fmt.Errorf("subformat=%s makes several files, and an export is one file", value)
			}
		}
		for _, k := range otherFiles {
			if key == k {
				return fmt.Errorf("the option %s makes the image depend on another file, and an export is one file", key)
			}
		}
	}
	return nil
}

// options returns the options for qemu-img.
func (o Output) options() string {
	if o.Format.Name == "vpc" && !strings.Contains(o.Options, "force_size") { // the size is kept, and not rounded up
		return strings.TrimPrefix(o.Options+",force_size=on", ",")
	}
	return o.Options
}

// Convert writes the disk that the NBD server at socket serves by the given name into an empty file, as an image. The
// image gets the name of the file where a format keeps that.
func (o Output) Convert(ctx context.Context, socket, export string, f *os.File, dir string, progress func(percent float64)) error {
	source, err := json.Marshal(map[string]any{"driver": "raw", "file": map[string]any{
		"driver": "nbd", "export": export, "server": map[string]string{"type": "unix", "path": socket},
	}})
	if err != nil {
		return err
	}
	// qemu-img opens the file by this link, even if it has no name of its own. What it complains of has the file's name.
	link := filepath.Join(dir, filepath.Base(f.Name()))
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), link); err != nil {
		return err
	}
	defer os.Remove(link)
	args := []string{"convert", "-p", "-f", "raw", "-O", o.Format.Name}
	if o.Compress {
		args = append(args, "-c")
	}
	if opts := o.options(); opts != "" {
		args = append(args, "-o", opts)
	}
	c, err := command(ctx, "qemu-img", append(args, "json:"+string(source), link)...)
	if err != nil {
		return err
	}
	var why complaint
	c.Stderr = &why
	c.Stdout = &percentages{progress: progress}
	err = c.Run()
	why.text = bytes.ReplaceAll(why.text, []byte(link), []byte(f.Name()))
	why.text = bytes.ReplaceAll(why.text, append([]byte("json:"), source...), []byte(export))
	if err := why.explain(ctx, err); err != nil {
		return err
	}
	return f.Sync()
}

// percentages reads the progress that qemu-img prints: "    (12.34/100%)\r".
type percentages struct {
	line     []byte
	progress func(float64)
}

func (p *percentages) Write(b []byte) (int, error) {
	for _, c := range b {
		if c != '\r' && c != '\n' {
			if len(p.line) < 64 {
				p.line = append(p.line, c)
			}
			continue
		}
		var percent float64
		if n, _ := fmt.Sscanf(strings.TrimSpace(string(p.line)), "(%f/100%%)", &percent); n == 1 && p.progress != nil {
			p.progress(percent)
		}
		p.line = p.line[:0]
	}
	return len(b), nil
}
