# median of a list of numbers; spread becomes half of its range, in percent of it. For the tables of the benchmarks.
function median(list,    v, n, i, j, t) {
	n = split(list, v, " ")
	for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j-1] + 0 > v[j] + 0; j--) { t = v[j]; v[j] = v[j-1]; v[j-1] = t }
	spread = v[1] > 0 ? (v[n] - v[1]) / 2 / v[int((n + 1) / 2)] * 100 : 0
	return n % 2 ? v[(n + 1) / 2] : (v[n/2] + v[n/2+1]) / 2
}
