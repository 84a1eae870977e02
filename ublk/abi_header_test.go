package ublk

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The user ABI of abi.go and uring.go in the names of linux/ublk_cmd.h and linux/io_uring.h. The test fails if a
// constant or a structure of abi.go, or a constant of uring.go, is missing here.

// headerConstants maps our constants to C expressions, or to "" if the headers do not define them.
var headerConstants = map[string]string{
	"cmdAddDev":            "UBLK_U_CMD_ADD_DEV",
	"cmdDelDev":            "UBLK_U_CMD_DEL_DEV",
	"cmdStartDev":          "UBLK_U_CMD_START_DEV",
	"cmdStopDev":           "UBLK_U_CMD_STOP_DEV",
	"cmdSetParams":         "UBLK_U_CMD_SET_PARAMS",
	"cmdGetParams":         "UBLK_U_CMD_GET_PARAMS",
	"cmdGetDevInfo2":       "UBLK_U_CMD_GET_DEV_INFO2",
	"cmdGetFeatures":       "UBLK_U_CMD_GET_FEATURES",
	"cmdUpdateSize":        "UBLK_U_CMD_UPDATE_SIZE",
	"cmdGetDevInfo":        "UBLK_U_CMD_GET_DEV_INFO",
	"cmdGetQueueAffinity":  "UBLK_U_CMD_GET_QUEUE_AFFINITY",
	"cmdQuiesceDev":        "UBLK_U_CMD_QUIESCE_DEV",
	"cmdStartUserRecovery": "UBLK_U_CMD_START_USER_RECOVERY",
	"cmdEndUserRecovery":   "UBLK_U_CMD_END_USER_RECOVERY",
	"cmdTryStopDev":        "UBLK_U_CMD_TRY_STOP_DEV",
	"iocRead":              "_IOR('u', 0, struct ublksrv_ctrl_cmd)",
	"iocReadWrite":         "_IOWR('u', 0, struct ublksrv_ctrl_cmd)",

	"ioFetchReq":          "UBLK_U_IO_FETCH_REQ",
	"ioCommitAndFetchReq": "UBLK_U_IO_COMMIT_AND_FETCH_REQ",
	"ioPrepCmds":          "UBLK_U_IO_PREP_IO_CMDS",
	"ioCommitCmds":        "UBLK_U_IO_COMMIT_IO_CMDS",
	"ioFetchCmds":         "UBLK_U_IO_FETCH_IO_CMDS",
	"batchHasBufAddr":     "UBLK_BATCH_F_HAS_BUF_ADDR",
	"elemSize":            "sizeof(struct ublk_elem_header) + sizeof(__u64)",
	"userCopyBase":        "UBLKSRV_IO_BUF_OFFSET",
	"userTagShift":        "UBLK_TAG_OFF",
	"userQueueShift":      "UBLK_QID_OFF",

	"maxQueueDepth":   "UBLK_MAX_QUEUE_DEPTH",
	"maxQueues":       "UBLK_MAX_NR_QUEUES",
	"maxIOBytes":      "1 << UBLK_IO_BUF_BITS",
	"sectorShift":     "", // SECTOR_SHIFT is the kernel's own
	"maxRangeSectors": "0xffffffffU >> 9",
	"descSize":        "sizeof(struct ublksrv_io_desc)",
	"descArea":        "UBLK_MAX_QUEUE_DEPTH * sizeof(struct ublksrv_io_desc)",

	"threadSignal": "", // nptl(7)
	"opMask":       "", // in ublksrv_get_op
	"flagFUA":      "UBLK_IO_F_FUA",
	"flagNoUnmap":  "UBLK_IO_F_NOUNMAP",
	"noQueue":      "(__u16)-1",
	"kernelPicks":  "(__u32)-1",
	"featuresSize": "UBLK_FEATURES_LEN",

	"attrReadOnly":      "UBLK_ATTR_READ_ONLY",
	"attrVolatileCache": "UBLK_ATTR_VOLATILE_CACHE",
	"attrFUA":           "UBLK_ATTR_FUA",
	"paramBasic":        "UBLK_PARAM_TYPE_BASIC",
	"paramDiscard":      "UBLK_PARAM_TYPE_DISCARD",

	"OpRead":         "UBLK_IO_OP_READ",
	"OpWrite":        "UBLK_IO_OP_WRITE",
	"OpFlush":        "UBLK_IO_OP_FLUSH",
	"OpDiscard":      "UBLK_IO_OP_DISCARD",
	"OpWriteZeroes":  "UBLK_IO_OP_WRITE_ZEROES",
	"KernelDead":     "UBLK_S_DEV_DEAD",
	"KernelLive":     "UBLK_S_DEV_LIVE",
	"KernelQuiesced": "UBLK_S_DEV_QUIESCED",
	"KernelFailIO":   "UBLK_S_DEV_FAIL_IO",

	"setupCQSize":         "IORING_SETUP_CQSIZE",
	"setupClamp":          "IORING_SETUP_CLAMP",
	"setupSubmitAll":      "IORING_SETUP_SUBMIT_ALL",
	"setupCoopTaskrun":    "IORING_SETUP_COOP_TASKRUN",
	"setupSQE128":         "IORING_SETUP_SQE128",
	"setupSingleIssuer":   "IORING_SETUP_SINGLE_ISSUER",
	"setupDeferTaskrun":   "IORING_SETUP_DEFER_TASKRUN",
	"setupNoSQArray":      "IORING_SETUP_NO_SQARRAY",
	"enterGetEvents":      "IORING_ENTER_GETEVENTS",
	"enterRegisteredRing": "IORING_ENTER_REGISTERED_RING",
	"registerFiles":       "IORING_REGISTER_FILES",
	"unregisterFiles":     "IORING_UNREGISTER_FILES",
	"registerEventfd":     "IORING_REGISTER_EVENTFD",
	"registerRingFDs":     "IORING_REGISTER_RING_FDS",
	"unregisterRingFDs":   "IORING_UNREGISTER_RING_FDS",
	"registerPbufRing":    "IORING_REGISTER_PBUF_RING",
	"cqeBuffer":           "IORING_CQE_F_BUFFER",
	"cqeMore":             "IORING_CQE_F_MORE",
	"cqeBufferShift":      "IORING_CQE_BUFFER_SHIFT",
	"cmdMultishot":        "IORING_URING_CMD_MULTISHOT",
	"sqeBufferSelect":     "IOSQE_BUFFER_SELECT",
	"featSingleMmap":      "IORING_FEAT_SINGLE_MMAP",
	"featNoDrop":          "IORING_FEAT_NODROP",
	"offSQRing":           "IORING_OFF_SQ_RING",
	"offSQEs":             "IORING_OFF_SQES",
	"opAsyncCancel":       "IORING_OP_ASYNC_CANCEL",
	"opRead":              "IORING_OP_READ",
	"opURingCmd":          "IORING_OP_URING_CMD",
	"sqeFixedFile":        "IOSQE_FIXED_FILE",
	"sqeSize":             "sizeof(struct io_uring_sqe) + 64", // SQE128: cmd goes on for 80 bytes
	"cqeSize":             "sizeof(struct io_uring_cqe)",
}

// headerStruct is one of our structures: its name in C, and the C names of the fields that have other names there. The
// header has no field for a name "".
type headerStruct struct {
	c      string
	fields map[string]string
}

var headerStructs = map[string]headerStruct{
	"ctrlCmd": {"ublksrv_ctrl_cmd", map[string]string{"devID": "dev_id", "queueID": "queue_id", "pathLen": "dev_path_len"}},
	"devInfo": {"ublksrv_ctrl_dev_info", map[string]string{
		"queues": "nr_hw_queues", "depth": "queue_depth", "maxIOBytes": "max_io_buf_bytes",
		"devID": "dev_id", "serverPID": "ublksrv_pid", "serverFlags": "ublksrv_flags", "ownerUID": "owner_uid", "ownerGID": "owner_gid",
	}},
	"ioDesc": {"ublksrv_io_desc", map[string]string{"opFlags": "op_flags", "sectors": "nr_sectors", "startSector": "start_sector"}},
	"ioCmd":  {"ublksrv_io_cmd", map[string]string{"queueID": "q_id"}},
	"paramsBasic": {"ublk_param_basic", map[string]string{
		"logicalShift": "logical_bs_shift", "physicalShift": "physical_bs_shift",
		"ioOptShift": "io_opt_shift", "ioMinShift": "io_min_shift", "maxSectors": "max_sectors", "chunkSectors": "chunk_sectors",
		"devSectors": "dev_sectors", "virtBoundary": "virt_boundary_mask",
	}},
	"paramsDiscard": {"ublk_param_discard", map[string]string{
		"alignment": "discard_alignment", "granularity": "discard_granularity",
		"maxSectors": "max_discard_sectors", "maxZeroesSectors": "max_write_zeroes_sectors", "maxSegments": "max_discard_segments",
	}},
	"params":    {"ublk_params", nil},
	"batchIO":   {"ublk_batch_io", map[string]string{"queueID": "q_id", "elements": "nr_elem", "elemBytes": "elem_bytes"}},
	"batchElem": {"ublk_elem_header", map[string]string{"bufIndex": "buf_index", "addr": ""}}, // the address follows the header

	"sqe": {"io_uring_sqe", map[string]string{
		"opFlags": "rw_flags", "userData": "user_data", "bufIndex": "buf_index",
		"persona": "personality", "fileIdx": "file_index",
	}},
	"cqe":       {"io_uring_cqe", map[string]string{"userData": "user_data"}},
	"sqOffsets": {"io_sqring_offsets", map[string]string{"mask": "ring_mask", "entries": "ring_entries"}},
	"cqOffsets": {"io_cqring_offsets", map[string]string{"mask": "ring_mask", "entries": "ring_entries"}},
	"ringParams": {"io_uring_params", map[string]string{
		"sqEntries": "sq_entries", "cqEntries": "cq_entries",
		"sqThreadCPU": "sq_thread_cpu", "sqThreadIdle": "sq_thread_idle", "wqFD": "wq_fd", "sq": "sq_off", "cq": "cq_off",
	}},
	"ringFDUpdate": {"io_uring_rsrc_update", nil},
	"pbufReg":      {"io_uring_buf_reg", map[string]string{"addr": "ring_addr", "entries": "ring_entries", "group": "bgid"}},
	"pbuf":         {"io_uring_buf", map[string]string{"id": "bid", "tail": "resv"}},
}

// prefixes are structures that may be longer in the header than here.
var prefixes = map[string]bool{"params": true, "sqe": true, "batchElem": true}

// TestLayoutAgainstHeader lets a C compiler compare every structure, field, command, flag and limit with the newest
// kernel's header: the one in the folders of $VDISK_UAPI ("guest headers" prints them), or else the installed one. With
// CI set the test is never skipped.
func TestLayoutAgainstHeader(t *testing.T) {
	cc, include := headerAndCompiler(t)
	lines := headerAssertions(t)
	src := "#include <stddef.h>\n#include <errno.h>\n#include <linux/ublk_cmd.h>\n#include <linux/io_uring.h>\n" + strings.Join(lines, "\n")
	file := filepath.Join(t.TempDir(), "layout.c")
	if err := os.WriteFile(file, []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, append(include, "-fsyntax-only", file)...).CombinedOutput(); err != nil {
		t.Errorf("the header disagrees: %s", out)
	}
	t.Logf("%d comparisons", len(lines))
}

// TestHeaderFeatures: every UBLK_F_ of the header is known, by its name.
func TestHeaderFeatures(t *testing.T) {
	cc, include := headerAndCompiler(t)
	cmd := exec.Command(cc, append(include, "-E", "-dM", "-")...)
	cmd.Stdin = strings.NewReader("#include <linux/ublk_cmd.h>\n")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`#define UBLK_F_(\w+) \(1UL?L? ?<< ?(\d+)\)`).FindAllSubmatch(out, -1)
	if len(found) < len(knownFeatures) {
		t.Fatalf("the header has %d features, want %d", len(found), len(knownFeatures))
	}
	for _, m := range found {
		known := slices.ContainsFunc(knownFeatures, func(k FeatureInfo) bool {
			return k.Name == string(m[1]) && fmt.Sprint(uint64(k.Feature)) == shifted(string(m[2]))
		})
		if !known {
			t.Errorf("feature UBLK_F_%s, bit %s, is not among knownFeatures", m[1], m[2])
		}
	}
}

func shifted(bit string) string {
	var n int
	_, _ = fmt.Sscan(bit, &n)
	return fmt.Sprint(uint64(1) << n)
}

// headerAndCompiler finds a C compiler and a header that is new enough. If there is none, it skips the test, or fails
// it if $VDISK_UAPI or CI is set.
func headerAndCompiler(t *testing.T) (cc string, include []string) {
	t.Helper()
	dirs := filepath.SplitList(os.Getenv("VDISK_UAPI"))
	for _, dir := range dirs {
		include = append(include, "-I", dir)
	}
	if len(dirs) == 0 {
		dirs = []string{"/usr/include"}
	}
	header := filepath.Join(dirs[0], "linux/ublk_cmd.h")
	text, err := os.ReadFile(header)
	newest := knownFeatures[len(knownFeatures)-1].Name
	lack := ""
	if err != nil {
		lack = err.Error()
	} else if !bytes.Contains(text, []byte("UBLK_F_"+newest)) {
		lack = fmt.Sprintf("%s is older than %s", header, newest)
	}
	if cc, err = exec.LookPath("cc"); err != nil {
		lack = "no C compiler (cc)"
	}
	switch {
	case lack == "":
	case os.Getenv("CI") != "" || os.Getenv("VDISK_UAPI") != "":
		t.Fatal(lack)
	default:
		t.Skipf("%s: set VDISK_UAPI to what 'guest headers' prints; here TestLayout alone checks the numbers", lack)
	}
	return cc, include
}

// headerAssertions reads the package's source, because only the source has all names to compare.
func headerAssertions(t *testing.T) []string {
	t.Helper()
	scope, strict := abiScope(t)
	sizes := types.SizesFor("gc", "amd64")
	var lines []string
	add := func(expr, value, what string) {
		lines = append(lines, fmt.Sprintf("_Static_assert((%s) == %s, %q);", expr, value, what))
	}
	for _, name := range scope.Names() {
		switch obj := scope.Lookup(name).(type) {
		case *types.Const:
			expr, listed := headerConstants[name]
			if strict[name] && !listed {
				t.Errorf("constant %s: headerConstants does not say what it is in the header", name)
			}
			if v := obj.Val(); expr != "" && v.Kind() == constant.Int {
				add(expr, v.ExactString()+"U", name)
			} else if expr != "" {
				t.Errorf("%s is not a number but %v", name, v)
			}
		case *types.TypeName:
			s, isStruct := obj.Type().Underlying().(*types.Struct)
			h, listed := headerStructs[name]
			if isStruct && strict[name] && !listed {
				t.Errorf("type %s: headerStructs does not say what it is in the header", name)
			}
			if isStruct && listed {
				if !prefixes[name] {
					add("sizeof(struct "+h.c+")", fmt.Sprint(sizes.Sizeof(s)), "size of "+name)
				}
				addFields(h, name, s, sizes, add)
			}
		}
	}
	for _, names := range []map[string]bool{keys(headerConstants), keys(headerStructs)} {
		for name := range names {
			if scope.Lookup(name) == nil {
				t.Errorf("%s is compared with the header, but is not in the package", name)
			}
		}
	}
	for _, k := range knownFeatures {
		add("UBLK_F_"+k.Name, fmt.Sprintf("%dU", uint64(k.Feature)), "feature "+k.Name)
	}
	for _, l := range layout {
		add(l.c, fmt.Sprint(l.got), l.c)
	}
	return lines
}

func addFields(h headerStruct, name string, s *types.Struct, sizes types.Sizes, add func(expr, value, what string)) {
	var fields []*types.Var
	for f := range s.Fields() {
		fields = append(fields, f)
	}
	for i, off := range sizes.Offsetsof(fields) {
		c, renamed := h.fields[fields[i].Name()]
		if !renamed {
			c = fields[i].Name()
		}
		if c == "_" || c == "" {
			continue
		}
		what := name + "." + fields[i].Name()
		add(fmt.Sprintf("offsetof(struct %s, %s)", h.c, c), fmt.Sprint(off), "offset of "+what)
		if name == "sqe" && c == "cmd" { // a flexible array in C
			continue
		}
		add(fmt.Sprintf("sizeof(((struct %s *)0)->%s)", h.c, c), fmt.Sprint(sizes.Sizeof(fields[i].Type())), "size of "+what)
	}
}

func keys[V any](m map[string]V) map[string]bool {
	all := map[string]bool{}
	for k := range m {
		all[k] = true
	}
	return all
}

// abiScope type-checks the package without its imports, which the ABI's constants and structures do not need. strict
// has the names that must be compared: those of abi.go, and the constants of uring.go.
func abiScope(t *testing.T) (scope *types.Scope, strict map[string]bool) {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	conf := types.Config{Sizes: types.SizesFor("gc", "amd64"), Error: func(error) {}}
	pkg, _ := conf.Check("ublk", fset, files, nil)
	strict = map[string]bool{}
	for _, name := range pkg.Scope().Names() {
		obj := pkg.Scope().Lookup(name)
		switch fset.Position(obj.Pos()).Filename {
		case "abi.go":
			strict[name] = true
		case "uring.go":
			_, isConst := obj.(*types.Const)
			strict[name] = isConst
		}
	}
	if len(strict) < 20 {
		t.Fatalf("abi.go declares %d names?", len(strict))
	}
	return pkg.Scope(), strict
}
