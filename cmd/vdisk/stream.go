package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/format"
	streams "github.com/vdisk/vdisk/internal/stream"
)

func (a *app) streamCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "stream",
		Category:  groupData,
		Usage:     "verify or describe what 'vdisk send' wrote",
		UsageText: "vdisk stream check|info FILE|-",
		Description: "Both read all streams in FILE, or in standard input, and need no store. They prove each frame, each unit and each sum.\n" +
			"check prints a line for each stream, info all that it says. Exit codes: 0 all streams are whole, 6 one is damaged, 1 the\n" +
			"last one is cut, or cannot be read. The message names the first frame that is wrong, and the byte at which it begins.",
	}, func(c *cli.Context) error {
		what, path := c.Args().Get(0), c.Args().Get(1)
		if what != "check" && what != "info" {
			return usageError{c, fmt.Errorf("%q: check and info are possible", what)}
		}
		in, done, err := a.input(c, path, sentStream)
		if err != nil {
			return err
		}
		defer done()
		return a.readStreams(in, what == "info", path)
	})
}

// sentStream is what the commands for streams read.
const sentStream = "'vdisk send', or to a file with a stream"

// input opens the file at path, or standard input, which should be connected to what. The caller calls the returned
// function when done with it.
func (a *app) input(c *cli.Context, path, what string) (io.Reader, func(), error) {
	if path == "-" {
		if isTerminal(a.stdin) {
			return nil, nil, usagef("standard input is a terminal: connect it to %s", what)
		}
		return patient{c.Context, a.stdin}, func() {}, nil
	}
	f, err := openPatiently(c.Context, path, os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	return patient{c.Context, f}, func() { _ = f.Close() }, nil
}

// streamJSON is a stream in the JSON output.
type streamJSON struct {
	Volume       string            `json:"volume"`
	Snapshot     string            `json:"snapshot"`
	GUID         string            `json:"guid"`
	Base         string            `json:"base"`      // GUID; empty: it is a full stream
	BaseName     string            `json:"base_name"` // VOL@SNAP, where it was made
	Size         int64             `json:"size"`
	LogicalBlock int               `json:"logical_block"`
	Compress     string            `json:"compress"`
	Created      time.Time         `json:"created"` // of the snapshot
	Properties   map[string]string `json:"properties"`
	Version      int               `json:"version"`
	Features     []string          `json:"features"`
	From         uint64            `json:"from"`  // the block at which it begins; not 0: it is a part, to be resumed with
	Mark         uint64            `json:"mark"`  // the last block that a mark or the end gives
	Units        uint64            `json:"units"` // as stored
	Holes        uint64            `json:"holes"`
	Data         uint64            `json:"data_bytes"` // of blocks in units, before compression
	Length       int64             `json:"length"`     // of the stream, in bytes
	Complete     bool              `json:"complete"`
}

func (j *streamJSON) count(t streams.Totals) {
	j.Units, j.Holes, j.Data, j.Length = t.Units, t.Holes, t.Blocks*format.BlockSize, t.Length
}

// title names what the stream carries.
func (j *streamJSON) title() string {
	text := j.Volume + "@" + j.Snapshot
	if j.BaseName != "" {
		text += " from " + j.BaseName
	}
	if j.From > 0 {
		text += fmt.Sprintf(", from block %d on", j.From)
	}
	return text
}

// readStreams reads all streams, and prints them, also those before an error.
func (a *app) readStreams(in io.Reader, all bool, path string) error {
	list, err := streamsIn(in)
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("it holds no stream: %w", io.ErrUnexpectedEOF)
	}
	if perr := a.print(map[string]any{"streams": list}, func() error { return a.printStreams(list, all) }); perr != nil {
		return perr
	}
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}

func streamsIn(in io.Reader) ([]streamJSON, error) {
	list := []streamJSON{}
	for r := streams.NewReader(in); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		j := streamJSON{
			Volume: h.Volume, Snapshot: h.Snapshot, GUID: h.GUID.String(), Base: h.Base.String(), BaseName: h.BaseName,
			Size: h.Size, LogicalBlock: h.LogicalBlock, Compress: h.Codec.String(), Created: h.Created.UTC(), Properties: map[string]string{},
			Version: h.Version, Features: append([]string{}, h.Features...), From: h.From, Mark: h.From,
		}
		maps.Copy(j.Properties, h.Properties)
		if h.Level != 0 {
			j.Compress += fmt.Sprintf(":%d", h.Level)
		}
		for err == nil {
			var f streams.Frame
			if f, err = r.Frame(); err == nil && f.Kind != format.FrameUnits {
				j.Mark, j.Complete = f.Mark.Block, f.Kind == format.FrameEnd
			}
			j.count(r.Totals())
		}
		list = append(list, j)
		if !errors.Is(err, io.EOF) {
			return list, err
		}
	}
}

func (a *app) printStreams(list []streamJSON, all bool) error {
	for i := range list {
		j := &list[i]
		state := "whole"
		if !j.Complete {
			state = fmt.Sprintf("not whole, up to block %d", j.Mark)
		}
		if !all {
			if _, err := fmt.Fprintf(a.stdout, "%s: %s in %d units, %d holes, %s: %s\n", j.title(), a.size(int64(j.Data)), j.Units, j.Holes, a.size(j.Length), state); err != nil {
				return err
			}
			continue
		}
		if err := a.fields(streamFields(a, j, state)); err != nil {
			return err
		}
		if i < len(list)-1 {
			fmt.Fprintln(a.stdout)
		}
	}
	return nil
}

func streamFields(a *app, j *streamJSON, state string) [][2]string {
	f := [][2]string{
		{"stream", j.title()},
		{"guid", j.GUID},
		{"base", dash(j.Base)},
		{"size", a.size(j.Size)},
		{"compress", j.Compress},
		{"logical block", fmt.Sprint(j.LogicalBlock)},
		{"created", when(j.Created)},
	}
	for _, key := range slices.Sorted(maps.Keys(j.Properties)) {
		f = append(f, [2]string{"property", key + "=" + j.Properties[key]})
	}
	return append(f, [][2]string{
		{"version", fmt.Sprintf("%d, needs %s", j.Version, dash(strings.Join(j.Features, ", ")))},
		{"data", fmt.Sprintf("%s in %d units, and %d holes", a.size(int64(j.Data)), j.Units, j.Holes)},
		{"length", a.size(j.Length)},
		{"state", state},
	}...)
}
