package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/urfave/cli/v2"
)

// manSection is the section of the manual for the administration of a system.
const manSection = 8

func (a *app) manCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:        "man",
		Category:    groupMaintenance,
		Usage:       "write the manual pages into a folder",
		UsageText:   "vdisk man DIR",
		Description: "DIR gets vdisk.8 and a page for each command, such as vdisk-create.8, and is created if it does not exist.",
	}, func(c *cli.Context) error {
		dir := c.Args().First()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		list := []string{}
		for name, text := range manPages(c.App) {
			list = append(list, fmt.Sprintf("%s.%d", name, manSection))
			// Everybody may read them, whatever the umask is.
			path := filepath.Join(dir, fmt.Sprintf("%s.%d", name, manSection))
			if err := os.WriteFile(path, md2man.Render([]byte(text)), 0o644); err != nil {
				return err
			}
			if err := os.Chmod(path, 0o644); err != nil {
				return err
			}
		}
		slices.Sort(list)
		return a.print(map[string]any{"folder": dir, "pages": list}, func() error { return nil })
	})
}

// exitCodes say what the exit codes mean.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "The command has done its work."},
	{exitFailed, "It has failed, in a way that has no code of its own."},
	{exitUsage, "It was written wrongly: a flag, a name or a size."},
	{exitNotFound, "A volume, a snapshot, a file or the store does not exist."},
	{exitExists, "A name is taken."},
	{exitBusy, "Something is in use, or kept by a hold."},
	{exitCorrupt, "Something is damaged."},
	{exitLeaks, "A check has found space that is lost to leaks, and nothing worse."},
	{exitUnsupported, "This machine, or this version of vdisk, cannot do it."},
	{exitNoSpace, "There is no space."},
	{exitDiffer, "A comparison has found a difference."},
}

// manPages returns the manual pages of the program, in Markdown, by name.
func manPages(program *cli.App) map[string]string {
	pages := map[string]string{}
	var main page
	main.head("vdisk", program.Usage)
	main.section("SYNOPSIS", "**vdisk** [_global options_] _command_ [_options_] [_arguments_]")
	main.section("DESCRIPTION", "Each command has a page of its own, such as **vdisk-create**(8). **vdisk help** shows the same as these pages.\n"+
		"A _VOL_ is the name of a volume, _VOL@SNAP_ that of a snapshot.")
	commands := program.VisibleCommands()
	slices.SortStableFunc(commands, func(x, y *cli.Command) int { return strings.Compare(x.Category, y.Category) })
	main.title("COMMANDS")
	for i, c := range commands {
		if i == 0 || c.Category != commands[i-1].Category {
			fmt.Fprintf(&main, "\n## %s\n", c.Category)
		}
		main.term("**"+c.Name+"**", c.Usage)
		pages["vdisk-"+c.Name] = commandPage(c)
	}
	main.title("GLOBAL OPTIONS")
	for _, f := range program.VisibleFlags() {
		main.flag(f)
	}
	main.title("EXIT STATUS")
	for _, e := range exitCodes {
		main.term(fmt.Sprintf("**%d**", e.code), e.meaning)
	}
	main.term(fmt.Sprintf("**%d**+_n_", exitSignal), "Signal n has ended it.")
	main.title("FILES")
	main.term(defaultStore, "The store, unless --store or VDISK_STORE names another folder.")
	pages["vdisk"] = main.String()
	return pages
}

func commandPage(c *cli.Command) string {
	var p page
	p.head("vdisk-"+c.Name, c.Usage)
	p.section("SYNOPSIS", literal(c.UsageText))
	if c.Description != "" {
		p.section("DESCRIPTION", description(c.Description))
	}
	p.title("OPTIONS")
	for _, f := range c.VisibleFlags() {
		p.flag(f)
	}
	p.flag(cli.HelpFlag)
	p.section("EXAMPLES", literal(examples[c.Name]))
	p.section("SEE ALSO", "**vdisk**(8), for the global options and the exit codes")
	return p.String()
}

// page is a manual page in Markdown.
type page struct{ strings.Builder }

func (p *page) head(name, usage string) {
	fmt.Fprintf(p, "%% %s %d\n\n# NAME\n\n%s - %s\n", name, manSection, name, paragraph(usage))
}

func (p *page) title(title string) { fmt.Fprintf(p, "\n# %s\n", title) }

func (p *page) section(title, text string) {
	p.title(title)
	fmt.Fprintf(p, "\n%s\n", text)
}

func (p *page) term(term, meaning string) { fmt.Fprintf(p, "\n%s\n: %s\n", term, paragraph(meaning)) }

// flag describes a flag as the help does, with its names and the placeholder of its value.
func (p *page) flag(f cli.Flag) {
	usage, value := "", ""
	if d, ok := f.(cli.DocGenerationFlag); ok {
		usage = d.GetUsage()
		if before, rest, ok := strings.Cut(usage, "`"); ok {
			name, after, _ := strings.Cut(rest, "`")
			usage, value = before+name+after, name
		}
		if d.TakesValue() {
			value = " _" + cmp.Or(value, "value") + "_"
		} else {
			value = ""
		}
		if def := d.GetValue(); d.TakesValue() && def != "" && !strings.Contains(usage, "default") {
			usage += " (default: " + def + ")"
		}
		if vars := d.GetEnvVars(); len(vars) > 0 {
			usage += " [" + strings.Join(vars, ", ") + "]"
		}
	}
	var names []string
	for _, n := range f.Names() {
		names = append(names, "**"+strings.Repeat("-", min(len(n), 2))+n+"**")
	}
	p.term(strings.Join(names, ", ")+value, usage)
}

// description returns the description of a command. Lines with a gap in them are of a table, and stay as they are.
func description(text string) string {
	var out strings.Builder
	table := false
	for line := range strings.SplitSeq(text, "\n") {
		if inTable := strings.Contains(line, "  "); inTable != table {
			table = inTable
			out.WriteString(map[bool]string{true: "\n```\n", false: "```\n\n"}[table])
		}
		if !table {
			line = paragraph(line)
		}
		out.WriteString(line + "\n")
	}
	if table {
		out.WriteString("```\n")
	}
	return out.String()
}

// paragraph returns text in which Markdown finds nothing to format.
func paragraph(text string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "_", `\_`, "`", "\\`", "<", `\<`, "[", `\[`, "]", `\]`).Replace(text)
}

// literal returns lines that are shown as they are.
func literal(text string) string { return "```\n" + text + "\n```" }
