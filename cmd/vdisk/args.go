package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// reorderArgs puts the arguments into the order that package cli understands. After a command's first argument that is
// not a flag, package cli takes everything for an argument, even "--size 10G". So flags of the program move before the
// command, flags of the command right behind it, and the rest follows "--".
func reorderArgs(program *cli.App, args []string) []string {
	global := flagTable(program.Flags)
	global.add(cli.HelpFlag, cli.VersionFlag)
	rest := args[1:]
	var before, flags, positional []string
	var command *cli.Command
	var local table
	for len(rest) > 0 {
		arg := rest[0]
		rest = rest[1:]
		switch {
		case arg == "--":
			positional = append(positional, rest...)
			rest = nil
		case !strings.HasPrefix(arg, "-") || arg == "-":
			if command == nil && len(positional) == 0 {
				if arg == "help" { // vdisk help and vdisk help COMMAND
					rest = append(rest, "--help")
					continue
				}
				if command = program.Command(arg); command != nil {
					local = flagTable(command.Flags)
					local.add(cli.HelpFlag)
					continue
				}
			}
			positional = append(positional, arg)
		default:
			name, _, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			taker, to := local, &flags
			if _, ok := local[name]; !ok {
				if _, ok := global[name]; ok || command == nil {
					taker, to = global, &before
				}
			}
			*to = append(*to, arg)
			if !taker.takesValue(arg, name) || hasValue {
				continue
			}
			// package cli reports that the value is missing, if nothing follows that it could take for it
			if len(rest) == 0 {
				if to == &before || command == nil {
					return append(append(args[:1:1], before...), flags...)
				}
				return append(append(append(args[:1:1], before...), command.Name), flags...)
			}
			*to = append(*to, rest[0])
			rest = rest[1:]
		}
	}
	if command == nil {
		if len(positional) > 0 { // no command: package cli would say so with an exit code of its own
			before = slices.DeleteFunc(before, isHelp)
		}
		return append(append(args[:1:1], before...), positional...)
	}
	out := append([]string{args[0]}, before...)
	if slices.ContainsFunc(flags, isHelp) {
		positional = nil // package cli would look for a help topic of that name
	}
	out = append(append(out, command.Name), flags...)
	if len(positional) > 0 {
		out = append(append(out, "--"), positional...)
	}
	return out
}

func isHelp(flag string) bool {
	return slices.Contains(cli.HelpFlag.Names(), strings.TrimLeft(flag, "-"))
}

// table maps each name of a flag to whether the flag takes a value.
type table map[string]bool

// takesValue reports whether the next argument is the value of the flag, or of the last one of several combined
// one-letter flags, as in -Ht.
func (t table) takesValue(arg, name string) bool {
	if _, ok := t[name]; ok || strings.HasPrefix(arg, "--") || name == "" {
		return t[name]
	}
	for _, letter := range name {
		if _, ok := t[string(letter)]; !ok {
			return false
		}
	}
	return t[name[len(name)-1:]]
}

func flagTable(flags []cli.Flag) table {
	t := table{}
	t.add(flags...)
	return t
}

func (t table) add(flags ...cli.Flag) {
	for _, f := range flags {
		takes := true
		if d, ok := f.(cli.DocGenerationFlag); ok {
			takes = d.TakesValue()
		}
		for _, name := range f.Names() {
			t[name] = takes
		}
	}
}
