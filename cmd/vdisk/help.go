package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
	"github.com/xrash/smetrics"
)

// helpTemplate is the help of a command. The texts of its two verbs are the examples and the global flags.
const helpTemplate = `NAME:
   {{template "helpNameTemplate" .}}

USAGE:
   {{template "usageTemplate" .}}{{if .Description}}

DESCRIPTION:
   {{template "descriptionTemplate" .}}{{end}}

EXAMPLES:
%s
OPTIONS:{{template "visibleFlagTemplate" .}}

GLOBAL OPTIONS:
%s`

// examples are what 'vdisk help COMMAND' shows, by the name of the command: a command a line.
var examples = map[string]string{
	"attach":      "vdisk attach vm1\nvdisk attach golden@v1 --read-only",
	"bench":       "vdisk bench\nvdisk bench --size 4G --time 30s --dir /srv",
	"check":       "vdisk check\nvdisk check vm1 --read-data",
	"clone":       "vdisk clone golden@v1 vm1\nvdisk clone golden@v1 vm1 vm2 vm3",
	"clients":     "vdisk clients\nvdisk clients vm1 --json",
	"completion":  "vdisk completion bash > /etc/bash_completion.d/vdisk",
	"compare":     "vdisk compare vm1@mon vm1@tue\nvdisk compare vm1@tue backup.img",
	"create":      "vdisk create vm1 10G\nvdisk create db --size 100G --compress zstd:3 --logical-block 4096\nvdisk create vm1 --from disk.img",
	"daemon":      "vdisk daemon\nvdisk --max-size 500G daemon\nvdisk daemon --nbd /run/vdisk/nbd.sock --socket-group kvm\nvdisk daemon --metrics 127.0.0.1:9750",
	"detach":      "vdisk detach vm1\nvdisk detach /dev/ublkb0 --force",
	"devices":     "vdisk devices\nvdisk devices --prune",
	"diff":        "vdisk diff vm1@mon vm1@tue\nvdisk diff vm1@mon --json",
	"disconnect":  "vdisk disconnect vm1\nvdisk disconnect nbd:3\nvdisk disconnect pid:4711",
	"events":      "vdisk events --since 2h\nvdisk events -f\nvdisk events --since yesterday --json",
	"export":      "vdisk export vm1@tue vm1.img\nvdisk export vm1@tue vm1.qcow2 --format qcow2 --compressed\nvdisk export vm1@tue - --format zstd",
	"export-diff": "vdisk export-diff vm1@mon mon.diff\nvdisk export-diff --from @mon vm1@tue tue.diff",
	"features":    "vdisk features",
	"flatten":     "vdisk flatten vm1\nvdisk flatten --all golden@v1",
	"gc":          "vdisk gc\nvdisk gc -n\nvdisk gc --cold",
	"get":         "vdisk get vm1\nvdisk get vm1 org:owner",
	"history":     "vdisk history vm1\nvdisk history vm1@mon",
	"hold":        "vdisk hold backup vm1@tue db@tue",
	"holds":       "vdisk holds\nvdisk holds vm1",
	"import":      "vdisk import disk.img vm1\nvdisk import disk.vmdk vm1 --format vmdk\nvdisk import - vm1 --format xz\nvdisk import good.img vm1 --repair",
	"import-diff": "vdisk import-diff mon.diff copy",
	"info":        "vdisk info\nvdisk info vm1@tue --json",
	"ls":          "vdisk ls\nvdisk ls --tree\nvdisk ls -l -t all vm1\nvdisk ls -H -t snap -o name,created",
	"man":         "vdisk man /usr/local/share/man/man8",
	"map":         "vdisk map vm1@tue --output json",
	"metrics":     "vdisk metrics\nvdisk metrics --json",
	"metadata":    "vdisk metadata rebuild\nvdisk metadata dump table.txt\nvdisk metadata restore table.txt",
	"prune":       "vdisk prune vm1 --keep-last 3 --keep-daily 7 -n\nvdisk prune --all --keep-hourly 24 --keep-weekly 4\nvdisk prune 'vm1@nightly-*' --keep-within 14d\nvdisk prune --policy",
	"receive":     "vdisk receive vm1 week\nvdisk receive copy@new -",
	"recover":     "vdisk recover\nvdisk recover vm1",
	"release":     "vdisk release backup vm1@tue db@tue",
	"rename":      "vdisk rename vm1 web1\nvdisk rename vm1@a vm1@before",
	"resize":      "vdisk resize vm1 200G\nvdisk resize vm1 +10G\nvdisk resize vm1 5G --shrink",
	"rm":          "vdisk rm vm1@mon vm1@tue\nvdisk rm 'vm1@nightly-*'\nvdisk rm -n vm1@..mon\nvdisk rm -r vm1\nvdisk rm -r -n vm1",
	"rollback":    "vdisk rollback vm1@before",
	"scrub":       "vdisk scrub\nvdisk scrub --wait\nvdisk scrub --status",
	"send":        "vdisk send vm1@mon\nvdisk send -i @mon vm1@tue\nvdisk send -n -I @mon vm1@wed",
	"serve":       "vdisk serve\nvdisk serve golden@v1 vm1 --socket /run/vm.sock\nvdisk serve --socket /run/vm.sock --socket-group kvm\nvdisk serve --listen 0.0.0.0:10809 --tls-certificates /etc/vdisk/server",
	"set":         "vdisk set vm1 org:owner=zoe\nvdisk set vm1 auto.attach=on\nvdisk set vm1 auto.keep=hourly=24,daily=7,weekly=4\nvdisk set vm1 note=",
	"snapshot":    "vdisk snapshot vm1@before\nvdisk snapshot 'vm*@nightly'\nvdisk snapshot vm1@tue db@tue\nvdisk snapshot --auto vm1 db\nvdisk snapshot --auto --policy\nvdisk snapshot vm1@clean --freeze /srv",
	"stats":       "vdisk stats vm1\nvdisk stats vm1 --interval 1s --count 10",
	"stream":      "vdisk stream check week\nvdisk stream info week",
	"top":         "vdisk top\nvdisk top --batch --count 2 --sort p99",
	"upgrade":     "vdisk upgrade",
	"version":     "vdisk version",
}

// helpOf returns the template for the help of a command.
func (a *app) helpOf(command string) string {
	var shown, global strings.Builder
	for line := range strings.Lines(examples[command]) {
		fmt.Fprintf(&shown, "   %s\n", strings.TrimSuffix(line, "\n"))
	}
	for _, f := range a.globalFlags() {
		fmt.Fprintf(&global, "   %s\n", f)
	}
	return fmt.Sprintf(helpTemplate, shown.String(), global.String())
}

// known are names that other programs give to what a command does.
var known = map[string]string{
	"add": "create", "backup": "send", "convert": "import", "copy": "clone", "journal": "events", "del": "rm", "delete": "rm", "destroy": "rm", "expire": "prune", "forget": "prune",
	"fsck": "check", "list": "ls", "log": "events", "logs": "events", "mount": "attach", "mv": "rename", "remove": "rm", "restore": "receive", "revert": "rollback",
	"kick": "disconnect", "show": "info", "snap": "snapshot", "status": "info", "umount": "detach", "unmap": "detach", "unmount": "detach",
	"verify": "check",
}

// similar is how alike two names must be (Jaro-Winkler, from 0 to 1) for one to be meant by the other.
const similar = 0.82

// meant returns the name among names that the user may have meant by typed, or "".
func meant(typed string, names []string) (best string) {
	score := similar
	for _, name := range names {
		if s := smetrics.JaroWinkler(typed, name, 0.7, 4); s > score {
			best, score = name, s
		}
	}
	return best
}

// unknownCommand is the error for a command that does not exist.
func unknownCommand(program *cli.App, typed string) error {
	name := known[typed]
	if name == "" {
		var names []string
		for _, c := range program.VisibleCommands() {
			names = append(names, c.Name)
		}
		name = meant(typed, names)
	}
	if name != "" {
		return usagef("there is no command %q; did you mean 'vdisk %s'? 'vdisk help' lists all", typed, name)
	}
	return usagef("there is no command %q; 'vdisk help' lists them", typed)
}

// unknownFlag is what package cli says of a flag that does not exist.
const unknownFlag = "flag provided but not defined: "

// flagError is the error for flags that package cli does not understand.
func flagError(c *cli.Context, err error) error {
	typed, ok := strings.CutPrefix(err.Error(), unknownFlag)
	if !ok {
		return usageError{c, err}
	}
	typed = strings.TrimLeft(typed, "-")
	var names []string
	flags := c.App.Flags
	if c.Command != nil {
		flags = append(flags[:len(flags):len(flags)], c.Command.Flags...)
	}
	for _, f := range flags {
		names = append(names, f.Names()...)
	}
	if name := meant(typed, names); len(name) > 1 {
		return usageError{c, fmt.Errorf("there is no flag --%s; did you mean --%s?", typed, name)}
	}
	if len(typed) == 1 {
		return usageError{c, fmt.Errorf("there is no flag -%s", typed)}
	}
	return usageError{c, fmt.Errorf("there is no flag --%s", typed)}
}
