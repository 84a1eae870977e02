package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// reorderArgs puts the arguments into the order that package cli understands: it takes what follows the first argument of a
// command that is no flag for an argument, even "--size 10G". Flags of the program move to before the command, flags of
// the command to right behind it, and the rest follows "--".
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
				if arg == "help" { // vdisk help, vdisk help COMMAND
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
			if len(rest) == 0 { // package cli says so, if nothing follows that it could take for the value
				if to == &before || command == nil {
					return append(append(args[:1:1], before...), flags...)
				}
				return append(append(append(args[:1:1], before...), command.Name), flags...)
			}
			*to = append(*to, rest[0])
			rest = rest[1:]
		}
	}
	out := append([]string{args[0]}, before...)
	if command == nil {
		return append(out, positional...)
	}
	if slices.ContainsFunc(flags, func(f string) bool { return slices.Contains(cli.HelpFlag.Names(), strings.TrimLeft(f, "-")) }) {
		positional = nil // package cli would look for a help topic of that name
	}
	out = append(append(out, command.Name), flags...)
	if len(positional) > 0 {
		out = append(append(out, "--"), positional...)
	}
	return out
}

// table says of each flag's names whether it takes a value.
type table map[string]bool

// takesValue reports whether the next argument is the value of a flag, or of the last of several of one letter, as in -Ht.
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
