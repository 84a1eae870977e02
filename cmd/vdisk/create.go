package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) createCommand() *cli.Command {
	return a.command(arity{1, 2}, &cli.Command{
		Name:      "create",
		Category:  groupVolumes,
		Usage:     "create a volume, and the store if there is none",
		UsageText: "vdisk create VOL SIZE [--from FILE|-] [--compress none|s2|zstd[:N]] [--logical-block 512|4096]",
		Flags: append(append(volumeFlags(), formatFlags()...),
			&cli.StringFlag{Name: "size", Aliases: []string{"s"}, Usage: "the `SIZE`, as a flag; with --from the default is the file's"},
			&cli.StringFlag{Name: "from", Usage: "fill the volume from an image (--format) or block device, or - for standard input"},
		),
	}, a.create)
}

// volumeFlags returns the flags of all commands that make a volume with properties of its own.
func volumeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "compress", Usage: "none, s2, or zstd with a level from 1 (fast) to 19 (small), as zstd:9", Value: "s2"},
		&cli.IntFlag{Name: "logical-block", Usage: "unit of addressing, 512 or 4096 bytes", Value: 512},
	}
}

// volumeOptions reads the flags of volumeFlags.
func volumeOptions(c *cli.Context) (o cow.VolumeOptions, err error) {
	if o.Codec, o.Level, err = compression(c); err != nil {
		return o, err
	}
	if o.LogicalBlock = c.Int("logical-block"); o.LogicalBlock != 512 && o.LogicalBlock != 4096 {
		return o, usageError{c, fmt.Errorf("--logical-block %d: 512 and 4096 are possible", o.LogicalBlock)}
	}
	return o, nil
}

// compression reads the flag --compress.
func compression(c *cli.Context) (codec format.Codec, level int, err error) {
	if codec, level, err = parseCompression(c.String("compress")); err != nil {
		err = usageError{c, err}
	}
	return codec, level, err
}

// parseCompression parses a codec's name, or one with a level behind a colon.
func parseCompression(compress string) (codec format.Codec, level int, err error) {
	name, text, hasLevel := strings.Cut(compress, ":")
	if codec, err = format.ParseCodec(name); err != nil {
		return codec, 0, fmt.Errorf("--compress: %w", err)
	}
	if hasLevel {
		if level, err = strconv.Atoi(text); err != nil || level == 0 {
			return codec, 0, fmt.Errorf("--compress %s: the level is no number from 1 on", compress)
		}
	}
	if err := format.CheckLevel(codec, level); err != nil {
		return codec, 0, fmt.Errorf("--compress: %w", err)
	}
	return codec, level, nil
}

func (a *app) create(c *cli.Context) error {
	name, err := volumeName(c, 0)
	if err != nil {
		return err
	}
	o, err := volumeOptions(c)
	if err != nil {
		return err
	}
	what, size := "size", c.Args().Get(1)
	if c.IsSet("size") {
		if size != "" {
			return usageError{c, fmt.Errorf("two sizes: %s and --size %s", size, c.String("size"))}
		}
		what, size = "--size", c.String("size")
	}
	if size != "" || c.IsSet("size") {
		if o.Size, err = a.sizeBetween(what, size, int64(o.LogicalBlock), cow.MaxVolume); err != nil {
			return err
		}
		if o.Size%int64(o.LogicalBlock) != 0 {
			return usagef("size %s: a multiple of the logical block (%d) is needed", size, o.LogicalBlock)
		}
	}
	if c.IsSet("from") {
		return a.importFrom(c, c.String("from"), name, o)
	}
	if o.Size == 0 {
		return usageError{c, errors.New("the size is missing")}
	}
	return a.duringNew(c, func(s owner.Store) error {
		v, err := s.CreateVolume(c.Context, name, o)
		if err != nil {
			return err
		}
		return a.printVolume(owner.Volume{VolumeInfo: v})
	})
}

// printChanged prints a volume that was changed as JSON. Without --json it prints nothing.
func (a *app) printChanged(c *cli.Context, s owner.Store, name string) error {
	if !a.json {
		return nil
	}
	v, err := s.Volume(c.Context, name)
	if err != nil {
		return err
	}
	return a.printVolume(v)
}

// printVolume prints a new volume as JSON. Without --json it prints nothing, since the user knows what was created.
func (a *app) printVolume(v owner.Volume) error {
	return a.print(volumeOf(v), func() error { return nil })
}
