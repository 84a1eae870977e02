package stream

import (
	"os"
	"testing"

	"github.com/vdisk/vdisk/internal/testwatch"
)

func TestMain(m *testing.M) { os.Exit(testwatch.Run(m)) }
