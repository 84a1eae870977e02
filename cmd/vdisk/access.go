package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

// accessFlags say who may connect to the Unix socket that a command makes.
func accessFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "socket-mode", Usage: "give the Unix socket the octal `MODE`", DefaultText: "0600, or 0660 with --socket-group"},
		&cli.StringFlag{Name: "socket-group", Usage: "give the Unix socket to `GROUP`, a name or number"},
	}
}

// socketAccess returns what accessFlags ask for.
func socketAccess(c *cli.Context) (access owner.Access, err error) {
	if c.IsSet("socket-group") {
		name := c.String("socket-group")
		gid, err := groupNumber(name)
		if err != nil {
			return access, usageError{c, fmt.Errorf("--socket-group %s: %w", name, err)}
		}
		access = owner.Access{Mode: 0o660, Group: &gid}
	}
	if c.IsSet("socket-mode") {
		text := c.String("socket-mode")
		mode, err := strconv.ParseUint(text, 8, 32)
		switch {
		case err != nil:
			return access, usageError{c, fmt.Errorf("--socket-mode %s: an octal number is needed, such as 0660", text)}
		case mode > 0o777:
			return access, usageError{c, fmt.Errorf("--socket-mode %s: a socket has permissions of up to 0777, and no other bits", text)}
		case mode&0o600 != 0o600:
			return access, usageError{c, fmt.Errorf("--socket-mode %s: the socket's owner needs 0600 at least", text)}
		}
		access.Mode = fs.FileMode(mode)
	}
	return access, nil
}

// groupNumber returns the number of a group, by its name or number.
func groupNumber(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err == nil {
		name = g.Gid
	}
	gid, nerr := strconv.ParseUint(name, 10, 31)
	if nerr == nil {
		return int(gid), nil
	}
	if errors.As(err, new(user.UnknownGroupError)) {
		return 0, errors.New("there is no such group")
	}
	return 0, err
}

// unreachable returns a warning if a socket was opened to a group or to all, and its folder lets them not through to it.
func unreachable(path string, access owner.Access) string {
	var st syscall.Stat_t
	folder := filepath.Dir(path)
	if access.Mode&0o022 == 0 || syscall.Stat(folder, &st) != nil || st.Mode&0o001 != 0 {
		return ""
	}
	gid := os.Getegid()
	if access.Group != nil {
		gid = *access.Group
	}
	if access.Mode&0o002 == 0 && st.Mode&0o010 != 0 && int(st.Gid) == gid {
		return ""
	}
	return fmt.Sprintf("the folder %s (mode %04o) keeps out others, for whom the socket has mode %04o: name a socket elsewhere, such as in /run",
		folder, st.Mode&0o777, access.Mode)
}
