// Package faulty makes the system calls of a program fail, for tests: with any error, half done, or late. The program
// is a function of this process (Run) or a command (Start). It needs no preparation, and makes its calls as always. A
// seccomp filter stops those on files and asks this package, which asks the test what becomes of each (Judge). Linux 5.19
// has what that takes (SECCOMP_RET_USER_NOTIF in seccomp(2)).
//
// What a program does to a file without a system call cannot be made to fail: bbolt reads its pages from a mapping.
package faulty
