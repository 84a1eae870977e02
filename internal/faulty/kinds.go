package faulty

import (
	"slices"

	"golang.org/x/sys/unix"
)

// Kind is a kind of fault of a disk.
type Kind struct {
	Name  string
	Fault Fault
	Ever  bool     // not only the nth call, but all from it on
	Only  []string // names of the calls that it can meet; nil: all
	Fine  bool     // it must do no harm
}

var (
	takeRoom = []string{"write", "allocate", "sync", "mkdir", "create", "rename", "copy"}
	transfer = []string{"read", "write"}
)

// Kinds are the kinds of fault that a test makes at each call in turn.
var Kinds = []Kind{
	{Name: "EIO", Fault: Fault{Err: unix.EIO}},
	{Name: "EIO ever after", Fault: Fault{Err: unix.EIO}, Ever: true},
	{Name: "ENOSPC", Fault: Fault{Err: unix.ENOSPC}, Only: takeRoom},
	{Name: "ENOSPC ever after", Fault: Fault{Err: unix.ENOSPC}, Only: takeRoom, Ever: true},
	{Name: "EINTR", Fault: Fault{Err: unix.EINTR}, Fine: true},
	{Name: "half, then EIO", Fault: Fault{Err: unix.EIO, Half: true}, Only: transfer},
	{Name: "half", Fault: Fault{Half: true}, Only: transfer, Fine: true},
	{Name: "half ever after", Fault: Fault{Half: true}, Only: transfer, Ever: true, Fine: true},
}

// Meets reports whether a call of that name can have this fault.
func (k Kind) Meets(name string) bool { return k.Only == nil || slices.Contains(k.Only, name) }
